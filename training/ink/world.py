"""Ink as a data set without end: picture `i` of a split is a pure function of the seed, the split and `i`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from sublimate.training.ink.renderer import Pose, Split, render, scans
from sublimate.training.ink.vocabulary import DIGITS, Glyph, all_glyphs
from sublimate.training.randomness import key

_NUMBERS_PER_SAMPLE = 8  # one picks the scan, seven the pose


def sample(indices: Sequence[int], split: Split = "train", seed: int = 0) -> tuple[Tensor, list[Glyph]]:
    """Pictures and what they show.

    Every run of 240 indices that starts at a multiple of 240 holds each combination of digit, ink and style once.

    Args:
        indices: which pictures; any integers from 0.
        split: whose handwriting, "train" or "held_out".
        seed: another seed gives another data set.

    Returns:
        Pictures (B, 3, 32, 32) in [0, 1] and one glyph each; `torch.tensor(glyphs)` is (B, 3) with columns digit,
        ink, style.

    Raises:
        ValueError: for no index, a negative one, or an unknown split.
    """
    glyphs, chosen, pose = describe(indices, split, seed)
    pictures, _ = scans(split)
    labels = torch.tensor(glyphs, dtype=torch.long).reshape(-1, 3)
    return render(pictures[chosen], labels[:, 1], labels[:, 2], pose), glyphs


def describe(indices: Sequence[int], split: Split, seed: int) -> tuple[list[Glyph], Tensor, Pose]:
    """What `sample` draws before it renders: glyphs, which scan of the split (B,), and the poses."""
    if len(indices) == 0 or min(indices) < 0:
        raise ValueError(
            f"Ink's pictures are numbered from 0; got the indices {list(indices)[:5]}, ask for at least one."
        )
    glyphs = [glyph_at(int(index), split, seed) for index in indices]
    members = _scans_by_digit(split)
    uniform = torch.stack([stream(_NUMBERS_PER_SAMPLE, seed, "ink", split, int(index)) for index in indices])
    lots = zip((members[glyph.digit] for glyph in glyphs), uniform[:, 0].tolist(), strict=True)
    chosen = [own[int(lot * len(own))] for own, lot in lots]
    return glyphs, torch.tensor(chosen, dtype=torch.long), Pose.from_uniform(uniform[:, 1:])


def glyph_at(index: int, split: Split, seed: int) -> Glyph:
    """The glyph of picture `index`, without rendering it."""
    round_, place = divmod(index, len(all_glyphs()))
    return all_glyphs()[_order(seed, split, round_)[place]]


def stream(n: int, *parts: object) -> Tensor:
    """`n` uniform numbers in [0, 1), float64, that depend on `parts` alone."""
    return torch.rand(n, generator=torch.Generator().manual_seed(key(*parts)), dtype=torch.float64)


@cache
def _scans_by_digit(split: Split) -> list[list[int]]:
    _, labels = scans(split)
    return [torch.nonzero(labels == digit).flatten().tolist() for digit in range(len(DIGITS))]


@lru_cache(maxsize=64)
def _order(seed: int, split: Split, round_: int) -> list[int]:
    """The order in which one round of 240 pictures goes through the combinations."""
    generator = torch.Generator().manual_seed(key(seed, "ink", split, "order", round_))
    return torch.randperm(len(all_glyphs()), generator=generator).tolist()
