"""Drawing with an encoder as it is, and whether pictures show the concepts they were asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sublimate.erasure.contrastive import Pair
from sublimate.erasure.request import Concept
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.generate import generate_latents
from sublimate.pipelines.model import Model
from sublimate.pipelines.sampling import at_once


class DetectorJudge:
    """A picture shows a concept if the concept's label is the likeliest of its group, "none of them" included.

    Args:
        model: decodes latents.
        detector: reads pictures.
        concepts: each called by one of the detector's labels.

    Raises:
        ValueError: for a concept that the detector has no label for.
    """

    name = "detector"

    def __init__(self, model: Model, detector: Detector, concepts: Sequence[Concept]) -> None:
        self.model, self.detector = model, detector
        self.places = [_place(detector, concept) for concept in concepts]

    def shows(self, latents: Tensor, concepts: Sequence[int]) -> Tensor:
        """Whether each of the latents (batch, ...) shows the concept of that index: bool (batch,)."""
        parts = latents.split(at_once(latents.shape, cost=4))
        seen = [self.detector(self.model.render(part)) for part in parts]
        read = {group: torch.cat([part[group].argmax(1) for part in seen]).tolist() for group in seen[0]}
        asked = [self.places[index] for index in concepts]
        return torch.tensor([read[group][i] == label for i, (group, label) in enumerate(asked)])


class PairJudge:
    """A picture shows a concept if, of all, that concept's phrases are nearest to it on average. Knows no "none".

    Args:
        pair: embeds pictures and prompts.
        states: per concept, the pooled states of its phrases as the model is.
    """

    name = "pair"

    def __init__(self, pair: Pair, states: Sequence[Tensor]) -> None:
        self.pair = pair
        self.names = torch.stack([pair.texts(own).mean(0) for own in states])

    def shows(self, latents: Tensor, concepts: Sequence[int]) -> Tensor:
        """As `DetectorJudge.shows`."""
        return ((self.pair.images(latents) @ self.names.mT).argmax(1)).cpu() == torch.tensor(concepts)


Judge = DetectorJudge | PairJudge


class Prober:
    """Draws a few pictures of every concept, always from the same noise, and has them judged.

    Args:
        model: draws.
        judge: reads; knows the concepts by their places in `phrases`.
        phrases: per concept, the prompts that name it.
        erased: how many of the concepts, the first ones, are to be erased.
        images: pictures per concept, of its phrases in turn.
        steps, guidance_scale: of the sampling.
        seed: keys the noise.
    """

    def __init__(
        self,
        model: Model,
        judge: Judge,
        phrases: Sequence[Sequence[str]],
        *,
        erased: int,
        images: int,
        steps: int,
        guidance_scale: float,
        seed: int,
    ) -> None:
        self.model, self.judge, self.erased, self.images = model, judge, erased * images, images
        # Spread over the phrases, which start with names in the first template.
        self.prompts = [own[i * len(own) // images % len(own)] for own in phrases for i in range(images)]
        self.steps, self.guidance_scale, self.seed = steps, guidance_scale, seed

    def rates(self) -> tuple[float, float]:
        """The shares of pictures that show their concepts: of the erased ones, and of the others."""
        latents = generate_latents(
            self.model, self.prompts, steps=self.steps, guidance_scale=self.guidance_scale, seed=self.seed
        )
        asked = [i // self.images for i in range(len(self.prompts))]
        with torch.no_grad():
            shows = self.judge.shows(latents, asked).float()
        return float(shows[: self.erased].mean()), float(shows[self.erased :].mean())


def _place(detector: Detector, concept: Concept) -> tuple[str, int]:
    for group, labels in detector.groups.items():
        for name in concept.names:
            if name in labels:
                return group, labels.index(name)
    raise ValueError(f"The detector has no label for {concept.name!r}: leave the detector out.")
