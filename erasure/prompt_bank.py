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
        guidance: told beside every prompt, for networks that read it; None for others.
    """

    def __init__(self, model: Model, groups: Sequence[Sequence[str]], guidance: float | None = None) -> None:
        self.guidance = guidance
        self._sizes = torch.tensor([len(group) for group in groups])
        self._starts = self._sizes.cumsum(0) - self._sizes
        prompts = [prompt for group in groups for prompt in group]
        parts = (prompts[start : start + _AT_ONCE] for start in range(0, len(prompts), _AT_ONCE))
        with torch.no_grad():
            self._condition = with_guidance(Condition.cat([model.encode_prompts(part) for part in parts]), guidance)

    def draw(self, random: SampleRandom) -> Tensor:
        """Rows of the bank, one per sample, (batch,) int64 on the CPU."""
        groups = random.integers(len(self._sizes))
        return self._starts[groups] + (random.uniform() * self._sizes[groups]).long()

    def condition(self, rows: Tensor, device: torch.device | str) -> Condition:
        """The prompts of these rows as a condition on a device."""
        return self._condition.index(rows.to(self._condition["text"].device)).to(device)


def concept_groups(
    concepts: Sequence[Concept], templates: Sequence[str], *, anchored: bool = False
) -> list[list[str]]:
    """Prompts per concept: its names in templates and its own prompts.

    Args:
        concepts: whose.
        templates: prompts with `{}` where names go.
        anchored: the same prompts, row by row, with anchors in the concepts' places.
    """
    phrases = [concept.phrases(templates) for concept in concepts]
    return [[phrase.anchored if anchored else phrase.text for phrase in own] for own in phrases]


def with_guidance(condition: Condition, guidance: float | None) -> Condition:
    """A condition with the guidance scale that a network reads; itself where that is None, or nothing is told."""
    if guidance is None or not condition:
        return condition
    device = next(iter(condition.values())).device
    return condition.replace(guidance=torch.full((condition.batch_size or 1,), guidance, device=device))
