"""The detector's training: real and broken pictures, both also as a decoder would give them back."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import AutoencoderKL

from sublimate.diffusion.conditions import Condition
from sublimate.training.ink.corruptions import broken
from sublimate.training.ink.detector import InkDetector, detector_loss, worn
from sublimate.training.ink.world import sample
from sublimate.training.objective import Artefact, Batch, Loss, ObjectiveConfig, SoloObjective, Turn
from sublimate.training.players import PlayerConfig, make_player
from sublimate.training.randomness import SampleRandom


class DetectingConfig(ObjectiveConfig):
    """Options of the detector's training.

    Attributes:
        detector: how the network is optimised.
    """

    detector: PlayerConfig = PlayerConfig(learning_rate=2e-3)

    def passes(self, step: int = 0) -> float:
        return 3


class Detecting(SoloObjective):
    """Cross-entropy over digit, ink and style, each with a class for "none of them".

    Args:
        detector: where training starts.
        config: options.
    """

    Config = DetectingConfig
    paper: ClassVar[str] = ""

    def __init__(self, detector: InkDetector, config: DetectingConfig) -> None:
        super().__init__(detector, config, "detector", make_player(detector, config.detector, ema=True))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"images", "labels"})

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        images = batch["images"]
        uniform = torch.stack([batch.random.uniform(images.device) for _ in range(3)], dim=1)
        return batch.adding(images=worn(images, uniform, batch.random.normal(images.shape[1:], images.device)))

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        return Loss(detector_loss(self.detector.logits(batch["images"]), batch["labels"]))

    @property
    def detector(self) -> InkDetector:
        module = self.player.module
        if not isinstance(module, InkDetector):
            raise TypeError(f"The detector must be an InkDetector, not {type(module).__name__}.")
        return module

    def exports(self) -> Artefact:
        return Artefact("attachment", self.detector)


class DetectorPictures:
    """Labelled pictures: two thirds real, one third broken; half of either sent through the autoencoder.

    Args:
        autoencoder: trained; what it does to a picture is what the detector must read through.
    """

    provides = frozenset({"images", "labels"})

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        self.autoencoder = autoencoder

    @torch.no_grad()
    def batch(self, random: SampleRandom) -> Batch:
        indices = random.integers(2**31).tolist()
        cut = len(indices) * 2 // 3
        images, glyphs = sample(indices[:cut], "train")
        rest = broken(indices[cut:])
        images, labels = torch.cat([images, rest.images]), torch.cat([torch.tensor(glyphs), rest.targets])
        decoded = torch.arange(len(images)) % 2 == 0
        latents = self.autoencoder.encode(2 * images[decoded] - 1).latent_dist.mean
        images[decoded] = (self.autoencoder.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        return Batch(Condition(), random, {"images": images, "labels": labels})
