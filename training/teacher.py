"""What objectives read of a model, and the checks of options that depend on it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from pydantic import AfterValidator
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.training.objective import Batch


class Trainee(Protocol):
    """What training alone reads of a model."""

    denoiser: Denoiser

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    def null_condition(self) -> Condition: ...


class Teacher(Trainee, Protocol):
    """What distillation reads of a model besides: features for a discriminator, a denoiser that is told a number."""

    def any_condition(self) -> Condition: ...

    def feature_taps(self) -> tuple[str, ...]: ...

    def denoiser_with_number_input(self) -> Denoiser: ...


def frozen(teacher: Trainee) -> Denoiser:
    """The teacher's denoiser, in evaluation mode and without gradients to its weights."""
    return teacher.denoiser.requires_grad_(False).eval()


def images_and(null: Condition, *more: str) -> frozenset[str]:
    """The needs of an objective that reads images, their prompts where the model reads text, and more.

    Args:
        null: the model's null condition; without keys for an unconditional model.
        more: other needs, by name.
    """
    return frozenset({"images", *more} | ({"prompts"} if null else set()))


def scales_from(least: float) -> AfterValidator:
    """Validates a range (low, high) of guidance scales: least <= low <= high."""

    def checked(scales: tuple[float, float]) -> tuple[float, float]:
        if not least <= scales[0] <= scales[1]:
            raise ValueError(
                f"a range of guidance goes from a scale of at least {least:g} to a larger one, not {scales}."
            )
        return scales

    return AfterValidator(checked)


class Scales(NamedTuple):
    """The guidance scales that options ask for: drawn uniformly from low to high for each sample, 1 being none."""

    low: float
    high: float

    @classmethod
    def of(cls, scales: tuple[float, float] | None, scale: float = 1.0) -> Scales:
        """A range, or where there is none a single scale."""
        return cls(*(scales or (scale, scale)))

    @property
    def guided(self) -> bool:
        """Whether any differs from none."""
        return self != (1, 1)

    def drawn(self, batch: Batch, device: torch.device) -> Batch:
        """The batch with a scale for each sample, where there is more than one."""
        if self.low == self.high:
            return batch
        return batch.adding(scale=self.low + (self.high - self.low) * batch.random.uniform(device))

    def in_batch(self, batch: Batch) -> float | Tensor:
        """What `drawn` drew, (batch,), or the one scale."""
        return self.low if self.low == self.high else batch["scale"]


def check_one_guidance(scales: tuple[float, float] | None, scale: float, usual: float) -> None:
    """Refuses a scale beside a range that scales are drawn from.

    Args:
        scales: the range, if there is one.
        scale: the option `guidance_scale`.
        usual: its default, which says nothing.

    Raises:
        ValueError: when both are given.
    """
    if scales is not None and scale != usual:
        raise ValueError("guidance_scale is not used where guidance_range is given: set that to null, or leave it.")


def check_guidance(null: Condition, *scales: float, option: str = "guidance_scale") -> None:
    """Refuses guidance where there is no text to guide by.

    Args:
        null: the teacher's null condition; without keys where there is nothing to lead away from.
        scales: the guidance scales that will be used; 1 is none.
        option: of the objective, which gave them.

    Raises:
        ValueError: when the teacher has no null condition and a scale is not 1.
    """
    if not null and any(scale != 1 for scale in scales):
        raise ValueError(
            f"objective.{option} is {', '.join(map(str, scales))}, but the teacher has no null condition to guide by: "
            "1 is no guidance."
        )
