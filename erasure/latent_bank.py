"""Clean latents that erasers noise and train on: drawn by the model as it is, or encoded pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sublimate.erasure.request import Concept
from sublimate.pipelines.generate import generate_latents
from sublimate.pipelines.model import Model
from sublimate.pipelines.sampling import at_once
from sublimate.training.data import read_image
from sublimate.training.randomness import SampleRandom, key


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


def drawn_bank(
    model: Model,
    concepts: Sequence[Concept],
    templates: Sequence[str],
    *,
    anchored: bool = False,
    count: int,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int | None = None,
) -> LatentBank:
    """A bank with one row per phrase of the concepts, as `concept_bank` has them.

    Args:
        model: draws, as it is.
        concepts: a concept's own `images` stand for all its rows, where it has some.
        templates: prompts with `{}` where names go.
        anchored: draw the phrases with anchors in the concepts' places instead; pictures are then not read.
        count: latents per phrase.
        steps, guidance_scale: of the sampling.
        seed: keys the noise.
        batch_size: latents drawn at a time; by default fewer, the larger they are.

    Raises:
        ValueError: when a picture has another size than the model's.
        FileNotFoundError: when a picture is missing.
    """
    rows: list[Tensor | None] = []
    texts: list[str] = []
    for concept in concepts:
        pictured = encoded(model, concept.images) if concept.images and not anchored else None
        for phrase in concept.phrases(templates):
            rows.append(pictured)
            if pictured is None:
                texts += [phrase.anchored if anchored else phrase.text] * count
    if texts:
        drawn = generate_latents(
            model, texts, steps=steps, guidance_scale=guidance_scale, seed=seed, batch_size=batch_size
        )
        parts = iter(drawn.float().cpu().split(count))
        return LatentBank([next(parts) if row is None else row for row in rows])
    return LatentBank([row for row in rows if row is not None])


def few_latents(
    model: Model,
    concepts: Sequence[Concept],
    templates: Sequence[str],
    *,
    count: int,
    zero_shot: bool,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int | None = None,
) -> LatentBank:
    """A bank with one row per phrase of the concepts, in which all rows of a concept share its few latents.

    They are a concept's own `images`, where it has some, else what the model draws for its first phrase.

    Args:
        zero_shot: uniform numbers in [0, 1) in place of latents; nothing is read or drawn.

    The others, and errors, are `drawn_bank`'s.
    """
    rows: list[Tensor] = []
    for place, concept in enumerate(concepts):
        phrases = concept.phrases(templates)
        if zero_shot:
            generator = torch.Generator().manual_seed(key(seed, "zero shot", place))
            latents = torch.rand((count, *model.latent_shape), generator=generator)
        elif concept.images:
            latents = encoded(model, concept.images)
        else:
            texts, drawn_from = [phrases[0].text] * count, key(seed, "few", place)
            latents = generate_latents(
                model, texts, steps=steps, guidance_scale=guidance_scale, seed=drawn_from, batch_size=batch_size
            )
            latents = latents.float().cpu()
        rows += [latents] * len(phrases)
    return LatentBank(rows)


def encoded(model: Model, files: Sequence[Path]) -> Tensor:
    """Pictures as latents, (count, *latent_shape) float32 on the CPU.

    Raises:
        ValueError: when they differ in size, or are not of the model's.
        FileNotFoundError: when one is missing.
    """
    images = [read_image(file) for file in files]
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"The pictures of one concept, {files[0]} and others, differ in size: resize them.")
    parts = torch.stack(images).split(at_once(model.latent_shape, 16, cost=4))
    with torch.no_grad():
        latents = torch.cat([model.encode(part.to(model.device)).float().cpu() for part in parts])
    if latents.shape[1:] != tuple(model.latent_shape):
        size = " x ".join(map(str, images[0].shape[1:]))
        raise ValueError(f"{files[0]} is {size} pixels, which {model.source} does not draw: resize the pictures.")
    return latents
