"""SNOOPI: SwiftBrush's one-step distillation with random guidance, and with negative prompts (Nguyen et al. 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

import torch
from pydantic import model_validator

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.guidance import extrapolated, guided
from sublimate.pipelines.negative_attention import (
    NEGATIVE,
    STRENGTH,
    as_text,
    install_negative_attention,
    negative_part,
    without_negative,
)
from sublimate.training.losses import pseudo_target_loss, score_difference
from sublimate.training.matching import Matching, MatchingConfig
from sublimate.training.objective import Batch, Loss, Turn
from sublimate.training.players import PlayerConfig
from sublimate.training.teacher import Scales, Teacher, check_guidance, check_one_guidance


class SwiftBrushConfig(MatchingConfig):
    """Options of SwiftBrush as SNOOPI trains it; defaults are those published for Stable Diffusion 1.5 and 2.1.

    Attributes:
        guidance_range: (low, high) of the teacher's guidance, drawn for each sample; None takes `guidance_scale`.
        guide_critic: guide the critic by the same scale, as published (see `SwiftBrush`).
        negative_attention: NASA-T, the student reads negative prompts.
        sample_normalization: divide each sample's gradient by mean|x0 - mu_p|, DMD's weight.

    The others are `MatchingConfig`'s.
    """

    guidance_range: tuple[float, float] | None = (0.5, 4.0)
    guide_critic: bool = False
    negative_attention: bool = False
    sample_normalization: bool = True
    student: PlayerConfig = PlayerConfig(learning_rate=1e-6)
    critic: PlayerConfig = PlayerConfig(kind="lora", rank=64, lora_alpha=128, learning_rate=1e-3)

    @model_validator(mode="after")
    def _one_guidance(self) -> Self:
        usual = type(self).model_fields["guidance_scale"].default
        check_one_guidance(self.guidance_range, self.guidance_scale, usual)
        low, high = self.scales
        if not 0 <= low <= high < float("inf"):
            raise ValueError(f"guidance_range is (low, high) with 0 <= low <= high, not ({low}, {high}).")
        if self.negative_attention and low == high == 1:
            raise ValueError("Without guidance the teacher reads no negative prompts: guide it, or leave them out.")
        return self

    @property
    def scales(self) -> Scales:
        """The teacher's guidance."""
        return Scales.of(self.guidance_range, self.guidance_scale)

    @property
    def teacher_passes(self) -> int:
        """Network passes of one guided prediction; a network that is told the scale has no negative prompts."""
        return 2 if self.negative_attention else self._guided_passes

    @property
    def _guided_passes(self) -> int:
        return self.guided_passes(self.scales.guided)

    def student_passes(self, step: int = 0) -> float:
        return 3 + self.teacher_passes + (self._guided_passes if self.guide_critic else 1)


class SwiftBrush(Matching):
    """Variational score distillation whose guidance is random (PG-SB, arXiv 2412.02687, eq. 6).

        grad = E[w(t) (mu_q - mu_p^k)(x_t, t, c) dx0/dtheta],   mu^k = mu_null + k (mu_c - mu_null),   k ~ U(low, high)

    The scale k is the teacher's. The pull is affine in k, so that without `sample_normalization` its expectation is
    that of the mean scale (low + high) / 2, and the range adds variance alone; with it, each sample's weight depends
    on its k. The published variant guides the critic by k too (`guide_critic`). With both guided, mu_q^k = mu_p^k at
    every k where the critic equals the teacher: the unguided teacher's distribution is then a fixed point, and
    guidance is not distilled.

    With `negative_attention` (NASA-T) the student attends away from a random negative prompt y- with a random strength
    in [0, 1), and the teacher is guided away from the same: (1 - k) mu(y-) + k mu(y). The critic reads no negatives,
    which the paper found best. The student is exported as stock weights; `generate(..., negative_prompt=...,
    negative_strength=...)` steers it.

    Args:
        model: the teacher; stays frozen.
        config: options.

    Raises:
        ValueError: for guidance of an unconditional teacher, or negative attention of a family without it.
    """

    Config = SwiftBrushConfig
    paper: ClassVar[str] = "2412.02687"

    def __init__(self, model: Teacher, config: SwiftBrushConfig) -> None:
        super().__init__(model, config)
        check_guidance(self.null, *(config.guidance_range or ()), option="guidance_range")
        if config.negative_attention:
            install_negative_attention(self.student.network)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"negatives"} if self.config.negative_attention else set())

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        device = next(self.student.parameters()).device
        batch = self.config.scales.drawn(batch, device)
        if not self.config.negative_attention:
            if NEGATIVE in batch.condition:
                raise ValueError("Only negative_attention reads negative prompts: set it, or data.negatives to null.")
        else:
            # Only the student is told of negatives, the teacher sees them as its null text.
            told = {**negative_part(batch.condition), "strength": batch.random.uniform(device).float()}
            batch = replace(batch.adding(**told), condition=without_negative(batch.condition))
        return super().prepare(turn, batch, step)

    def told(self, batch: Batch) -> Condition:
        if not self.config.negative_attention:
            return batch.condition
        return batch.condition.replace(**negative_part(batch.tensors), **{STRENGTH: batch["strength"]})

    def student_loss(self, batch: Batch, step: int) -> Loss:
        x0, scale = self.sample(batch), self.config.scales.in_batch(batch)
        with torch.no_grad():
            x_t = self.noised(x0, batch)
            if self.config.negative_attention:
                null = self.null.expand(len(x0)).replace(**as_text(negative_part(batch.tensors)))
                p = extrapolated(self.teacher, x_t, batch["t"], batch.condition, null, scale)
            else:
                p = guided(self.teacher, x_t, batch["t"], batch.condition, self.null, scale)
            if self.config.guide_critic:
                q = guided(self.critic, x_t, batch["t"], batch.condition, self.null, scale)
            else:
                q = self.critic(x_t, batch["t"], batch.condition)
            direction = score_difference(x0, p, q, normalized=self.config.sample_normalization)
        return Loss(pseudo_target_loss(x0, direction).mean())
