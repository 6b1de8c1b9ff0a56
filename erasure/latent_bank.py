"""Clean latents that erasers noise and train on: drawn by the model as it is, or encoded pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from sublimate.erasure.prompt_bank import concept_groups
from sublimate.erasure.request import Concept
from sublimate.pipelines.generate import generate_latents
from sublimate.pipelines.model import Model
from sublimate.pipelines.sampling import at_once
from sublimate.training.captioned import decoded
from sublimate.training.config import Config
from sublimate.training.data_config import DataConfig
from sublimate.training.randomness import SampleRandom, key
from sublimate.training.sources import framing_of


class LatentBank:
    """Latents in rows that match those of a `PromptBank`; a draw takes one of its row's, each with equal chances.

    Args:
        rows: (count, *latent_shape) each, on the CPU.
    """

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self.rows = list(rows)

    def each(self) -> list[tuple[int, Tensor]]:
        """Every latent once, with a row that it belongs to."""
        first = {id(latents): row for row, latents in reversed(list(enumerate(self.rows)))}
        return [(row, latent) for row in sorted(first.values()) for latent in self.rows[row]]

    def draw(self, rows: Tensor, random: SampleRandom, device: torch.device | str) -> Tensor:
        """One latent per sample, (batch, *latent_shape)."""
        sources, places = [self.rows[row] for row in rows.tolist()], random.uniform().tolist()
        picked = [source[int(u * len(source))] for source, u in zip(sources, places, strict=True)]
        return torch.stack(picked).to(device)


class LatentBankConfig(Config):
    """Options of a bank whose latents the model draws once, as it is, for concepts without pictures of their own.

    Attributes:
        images: latents per prompt that is drawn.
        sampling_steps: DDIM steps of each.
        start_guidance: guidance of that sampling, as this library counts it; 1 is none.
    """

    images: int = Field(default=20, ge=1)
    sampling_steps: int = Field(default=50, ge=1)
    start_guidance: float = Field(default=7.5, ge=1)

    def draw(self, model: Model, texts: Sequence[str], *, seed: int, batch_size: int | None) -> list[Tensor]:
        """Latents of each text, (images, *latent_shape) float32 on the CPU.

        Args:
            model: draws, as it is.
            texts: prompts, or none.
            seed: keys the noise.
            batch_size: latents drawn at a time; by default fewer, the larger they are.
        """
        if not texts:
            return []
        drawn = generate_latents(
            model,
            [text for text in texts for _ in range(self.images)],
            steps=self.sampling_steps,
            guidance_scale=self.start_guidance,
            seed=seed,
            batch_size=batch_size,
        )
        return list(drawn.float().cpu().split(self.images))


def drawn_bank(
    model: Model,
    concepts: Sequence[Concept],
    templates: Sequence[str],
    config: LatentBankConfig,
    *,
    anchored: bool = False,
    seed: int,
    batch_size: int | None = None,
) -> LatentBank:
    """A bank with one row per phrase of the concepts, as `concept_groups` has them.

    Args:
        model: draws, as it is.
        concepts: a concept's own `images` stand for all its rows, where it has some.
        templates: prompts with `{}` where names go.
        config: how latents of the other phrases are drawn.
        anchored: draw the phrases with anchors in the concepts' places instead; pictures are then not read.
        seed, batch_size: as in `LatentBankConfig.draw`.

    Raises:
        ValueError: when a picture is missing, or none, or the model makes no images.
    """
    groups = concept_groups(concepts, templates, anchored=anchored)
    given = [encoded(model, concept.images) if concept.images and not anchored else None for concept in concepts]
    texts = [text for own, group in zip(given, groups, strict=True) if own is None for text in group]
    drawn = iter(config.draw(model, texts, seed=seed, batch_size=batch_size))
    return LatentBank(
        [next(drawn) if own is None else own for own, group in zip(given, groups, strict=True) for _ in group]
    )


def few_latents(
    model: Model,
    concepts: Sequence[Concept],
    templates: Sequence[str],
    config: LatentBankConfig,
    *,
    zero_shot: bool,
    seed: int,
    batch_size: int | None = None,
) -> LatentBank:
    """As `drawn_bank`, but all rows of a concept share its few latents: its own `images`, or its first phrase's.

    Args:
        zero_shot: uniform numbers in [0, 1) in place of latents; nothing is read or drawn.

    The others, and errors, are `drawn_bank`'s.
    """
    rows: list[Tensor] = []
    for place, (concept, group) in enumerate(zip(concepts, concept_groups(concepts, templates), strict=True)):
        if zero_shot:
            generator = torch.Generator().manual_seed(key(seed, "zero shot", place))
            latents = torch.rand((config.images, *model.latent_shape), generator=generator)
        elif concept.images:
            latents = encoded(model, concept.images)
        else:
            (latents,) = config.draw(model, group[:1], seed=key(seed, "few", place), batch_size=batch_size)
        rows += [latents] * len(group)
    return LatentBank(rows)


def encoded(model: Model, files: Sequence[Path]) -> Tensor:
    """Pictures as latents, (count, *latent_shape) float32 on the CPU.

    Pictures of any size are shrunk or enlarged until they cover the model's own, and cropped to their middle.

    Raises:
        ValueError: when one is missing, or no picture, or the model makes no images.
    """
    options = DataConfig(train_data_dir=files[0].parent, center_crop=True)
    framing, size, found = framing_of(model, options), at_once(model.latent_shape, 16, cost=4), []
    for start in range(0, len(files), size):
        part = list(enumerate(files))[start : start + size]
        images = torch.stack([framing(decoded(file, str(file)), row) for row, file in part])
        with torch.no_grad():
            found.append(model.encode(images.to(model.device)).float().cpu())
    return torch.cat(found)
