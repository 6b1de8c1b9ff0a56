"""Encoded prompts that fine-tuning erasers draw from, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.erasure.request import Concept
from sublimate.pipelines.model import Model
from sublimate.training.randomness import SampleRandom

_AT_ONCE = 32
"""Prompts that text encoders read together: hundreds would take gigabytes of a T5."""


class PromptBank:
    """Prompts in groups, encoded once; a draw picks a group, then one of its prompts, each with equal chances.

    Args:
        model: encodes the prompts.
        groups: prompts per concept, none empty.
    """

    def __init__(self, model: Model, groups: Sequence[Sequence[str]]) -> None:
        self._sizes = torch.tensor([len(group) for group in groups])
        self._starts = self._sizes.cumsum(0) - self._sizes
        prompts = [prompt for group in groups for prompt in group]
        parts = (prompts[start : start + _AT_ONCE] for start in range(0, len(prompts), _AT_ONCE))
        with torch.no_grad():
            self._condition = Condition.cat([model.encode_prompts(part) for part in parts])

    def draw(self, random: SampleRandom) -> Tensor:
        """Rows of the bank, one per sample, (batch,) int64 on the CPU."""
        groups = random.integers(len(self._sizes))
        return self._starts[groups] + (random.uniform() * self._sizes[groups]).long()

    def condition(self, rows: Tensor, device: torch.device | str) -> Condition:
        """The prompts of these rows as a condition on a device."""
        return self._condition.index(rows.to(self._condition["text"].device)).to(device)


def concept_bank(model: Model, concepts: Sequence[Concept], templates: Sequence[str]) -> PromptBank:
    """A bank with one group per concept: its names in templates and its own prompts."""
    return PromptBank(model, [[phrase.text for phrase in concept.phrases(templates)] for concept in concepts])


def anchor_bank(model: Model, concepts: Sequence[Concept], templates: Sequence[str]) -> PromptBank:
    """The same prompts, row by row, with anchors in the concepts' places."""
    return PromptBank(model, [[phrase.anchored for phrase in concept.phrases(templates)] for concept in concepts])
