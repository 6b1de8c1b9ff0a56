"""Ink as training data: pictures for the autoencoder, latents with captions for the teacher."""

from __future__ import annotations

import random as stdlib_random
from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm.auto import trange

from sublimate.diffusion.conditions import Condition
from sublimate.training.ink.captions import caption
from sublimate.training.ink.vocabulary import Glyph
from sublimate.training.ink.world import glyph_at, sample
from sublimate.training.objective import Batch
from sublimate.training.randomness import SampleRandom, key

_CHUNK = 240


class Pictures:
    """Renderings of the training handwriting, (batch, 3, 32, 32) in [0, 1], never the same one twice in practice."""

    provides = frozenset({"images"})

    def batch(self, random: SampleRandom) -> Batch:
        images, _ = sample(random.integers(2**31).tolist(), "train")
        return Batch(Condition(), random, {"images": images})


class CaptionedLatents:
    """Latents of Ink's pictures, each time with a freshly drawn caption.

    Args:
        latents: (pictures, 4, 8, 8), scaled.
        glyphs: what each picture shows.
        encode_prompts: turns captions into a condition.
    """

    provides = frozenset({"images", "prompts"})

    def __init__(
        self, latents: Tensor, glyphs: Sequence[Glyph], encode_prompts: Callable[[list[str]], Condition]
    ) -> None:
        self.latents, self.glyphs, self.encode_prompts = latents, glyphs, encode_prompts

    def batch(self, random: SampleRandom) -> Batch:
        indices = random.integers(len(self.latents))
        seeds = random.integers(2**62).tolist()
        texts = [
            caption(self.glyphs[i], stdlib_random.Random(s)).text for i, s in zip(indices.tolist(), seeds, strict=True)
        ]
        return Batch(self.encode_prompts(texts), random, {"images": self.latents[indices]})


@torch.no_grad()
def encode_pictures(autoencoder: AutoencoderKL, count: int, *, progress: bool = True) -> tuple[Tensor, list[Glyph]]:
    """Unscaled latents (posterior means) of the first `count` training pictures, and their glyphs."""
    latents, glyphs = [], []
    for start in trange(0, count, _CHUNK, desc="latents", disable=not progress):
        images, shown = sample(range(start, min(start + _CHUNK, count)), "train")
        latents.append(autoencoder.encode(2 * images - 1).latent_dist.mean)
        glyphs += shown
    return torch.cat(latents), glyphs


def captioned(count: int, seed: int, *, render: bool) -> tuple[list[str], Tensor | None]:
    """Captions of Ink's training pictures, and the pictures themselves if asked for.

    Args:
        count: how many.
        seed: another seed draws other pictures and captions.
        render: also return the pictures, (count, 3, 32, 32) in [0, 1].
    """
    glyphs = [glyph_at(index, "train", seed) for index in range(count)]
    texts = [caption(glyph, stdlib_random.Random(key(seed, "caption", i))).text for i, glyph in enumerate(glyphs)]
    return texts, sample(range(count), "train", seed)[0] if render else None
