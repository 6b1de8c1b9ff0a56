"""Ink's autoencoder: 32x32 RGB to 4x8x8 latents, trained with an L1 reconstruction and a light KL term."""

from __future__ import annotations

from typing import ClassVar

from diffusers import AutoencoderKL
from pydantic import Field
from torch import Tensor

from sublimate.training.objective import Artefact, Batch, Loss, ObjectiveConfig, SoloObjective, Turn
from sublimate.training.players import PlayerConfig, make_player


class AutoencodingConfig(ObjectiveConfig):
    """Options of the autoencoder's training.

    Attributes:
        kl_weight: weight of the KL divergence to N(0, I), per latent element.
        edge_weight: weight of the L1 error of horizontal and vertical differences, which keeps strokes crisp.
        autoencoder: how the network is optimised.
    """

    kl_weight: float = Field(default=1e-4, ge=0)
    edge_weight: float = Field(default=0.5, ge=0)
    autoencoder: PlayerConfig = PlayerConfig(learning_rate=1e-3)

    def passes(self, step: int = 0) -> float:
        return 3


class Autoencoding(SoloObjective):
    """L1 reconstruction plus a KL penalty (Kingma & Welling 2013; Rombach et al. 2022, appendix G).

    Args:
        autoencoder: where training starts.
        config: options.
    """

    Config = AutoencodingConfig
    paper: ClassVar[str] = "2112.10752"

    def __init__(self, autoencoder: AutoencoderKL, config: AutoencodingConfig) -> None:
        player = make_player(autoencoder, config.autoencoder, ema=True)
        super().__init__(autoencoder, config, "autoencoder", player)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"images"})

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        images = batch["images"]
        channels, size = self.autoencoder.config.latent_channels, self._latent_size(images)
        return batch.adding(noise=batch.random.normal((channels, size, size), images.device))

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        images = 2 * batch["images"] - 1
        posterior = self.autoencoder.encode(images).latent_dist
        decoded = self.autoencoder.decode(posterior.mean + posterior.std * batch["noise"]).sample
        reconstruction = (decoded - images).abs().mean()
        edges = sum((decoded - images).diff(dim=dim).abs().mean() for dim in (-1, -2))
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        total = reconstruction + self.config.edge_weight * edges + self.config.kl_weight * kl
        return Loss(total, {"autoencoder/l1": reconstruction, "autoencoder/kl": kl})

    @property
    def autoencoder(self) -> AutoencoderKL:
        module = self.player.module
        if not isinstance(module, AutoencoderKL):
            raise TypeError(f"The autoencoder must be an AutoencoderKL, not {type(module).__name__}.")
        return module

    def _latent_size(self, images: Tensor) -> int:
        return images.shape[-1] // 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    def exports(self) -> Artefact:
        return Artefact("weights", self.autoencoder)
