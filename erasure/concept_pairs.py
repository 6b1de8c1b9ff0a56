"""Pictures and prompts of concepts as pairs, with the two losses that say how well a text encoder matches them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.erasure.contrastive import Pair, info_nce, pooled
from sublimate.erasure.latent_bank import LatentBank
from sublimate.erasure.request import Concept
from sublimate.pipelines.model import Model

Encode = Callable[[Sequence[str]], Condition]
"""Prompts -> their condition."""


class ConceptPairs:
    """Every phrase of some concepts with its pictures.

    Args:
        model: encodes prompts as it is, and knows where their tokens are.
        concepts: at least one.
        templates: prompts with `{}` where names go.
        bank: latents of their phrases, row by row.
    """

    def __init__(self, model: Model, concepts: Sequence[Concept], templates: Sequence[str], bank: LatentBank) -> None:
        self.model = model
        self.phrases = [[phrase.text for phrase in concept.phrases(templates)] for concept in concepts]
        rows = iter(bank.rows)
        self.pictures = [[next(rows) for _ in phrases] for phrases in self.phrases]

    def states(self, encode: Encode) -> list[Tensor]:
        """Per concept, the pooled states of its phrases, (phrases, width)."""
        return [pooled(self.model, encode(phrases), phrases) for phrases in self.phrases]

    def embedded(self, pair: Pair, size: int = 64) -> list[list[Tensor]]:
        """Per concept and phrase, its pictures' directions, (count, d)."""
        device = self.model.device
        with torch.no_grad():
            return [
                [torch.cat([pair.images(part.to(device)) for part in latents.split(size)]) for latents in own]
                for own in self.pictures
            ]


def forget_loss(pair: Pair, images: Sequence[Sequence[Tensor]], states: Sequence[Tensor]) -> Tensor:
    """mean(1 - cos) over all pairs of pictures and their phrases; erasing has to raise it.

    Args:
        images: per concept and phrase, directions (count, d).
        states: per concept, pooled states (phrases, width).
    """
    errors = [
        1 - shown @ said
        for own, told in zip(images, states, strict=True)
        for shown, said in zip(own, pair.texts(told), strict=True)
    ]
    return torch.cat(errors).mean()


def retain_loss(pair: Pair, images: Sequence[Sequence[Tensor]], states: Sequence[Tensor]) -> Tensor:
    """InfoNCE over rounds of one pair of each concept, in which every pair of the largest concept comes once.

    Args:
        images, states: as in `forget_loss`, of two or more concepts.
    """
    listed = [
        [(shown, said) for own_, said in zip(own, pair.texts(told), strict=True) for shown in own_]
        for own, told in zip(images, states, strict=True)
    ]
    rounds = max(map(len, listed))
    picked = [[own[i % len(own)] for own in listed] for i in range(rounds)]
    shown, said = (torch.stack([torch.stack([p[side] for p in round_]) for round_ in picked]) for side in (0, 1))
    return info_nce(shown, said, pair.scale)
