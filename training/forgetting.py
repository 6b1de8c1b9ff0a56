"""What a teacher alone reads: anchors in the place of concepts that a student shall not learn (SFD), and the text
encoders with what edits attached to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pydantic import field_validator, model_validator
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser, Only
from sublimate.diffusion.predictions import Prediction
from sublimate.pipelines.model import Model
from sublimate.pipelines.names import naming, renamed
from sublimate.training.config import Config

Encode = Callable[[Sequence[str]], Condition]


class Forget(Config):
    """A concept that the student shall not learn.

    Attributes:
        concept: how prompts call it, "seven".
        anchor: what the teacher is asked for in its place, "one"; the empty text for nothing in particular.
        synonyms: its other names.
    """

    concept: str
    anchor: str
    synonyms: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The concept's name and its synonyms."""
        return (self.concept, *self.synonyms)

    @field_validator("concept", "synonyms")
    @classmethod
    def _named(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not all(name.strip() for name in ([value] if isinstance(value, str) else value)):
            raise ValueError("A concept's names must not be empty.")
        return value

    @model_validator(mode="after")
    def _leads_elsewhere(self) -> Forget:
        if naming(self.names).search(self.anchor):
            raise ValueError(f"The anchor {self.anchor!r} names {self.concept!r} itself: choose what takes its place.")
        return self


def anchored(prompt: str, forget: Sequence[Forget]) -> str:
    """The prompt as the teacher is asked it: with anchors in the place of the concepts' names."""
    for one in forget:
        prompt = renamed(prompt, one.names, one.anchor)
    return prompt


def anchoring(encode: Encode, asking: Encode, forget: Sequence[Forget]) -> Encode:
    """Encodes prompts for the student, and beside them, by `asking`, what the teacher is asked instead."""

    def encoded(prompts: Sequence[str]) -> Condition:
        asked = asking([anchored(prompt, forget) for prompt in prompts])
        return encode(prompts).with_teacher(asked)

    return encoded


def forgetful(model: Model) -> Model:
    """The model as a teacher that is asked for anchors, over the same networks; what trains from it is not.

    Every player starts as a copy of the teacher's network and reads the prompt itself, the critic too: only then does
    it know the score of what the student draws for the prompt (Zhou et al. 2024, arXiv 2409.11219).
    """
    twin, plain = copy.copy(model), model.denoiser
    twin.denoiser = AnchoredTeacher(
        plain.network, plain.call, plain.schedule, plain.parametrization, reads_guidance=plain.reads_guidance
    )
    return twin


class AnchoredTeacher(Denoiser):
    """Predicts for what its condition asks of a teacher, and has the features of the prompt itself.

    By those features a discriminator tells the student's samples of a prompt from real ones, the anchor's, of the same
    prompt: as an anchor's features it could not tell them from what the student draws for the anchor. They take a
    pass of their own. A copy, which trains, is a plain denoiser that reads the prompt.
    """

    def forward(
        self, x_t: Tensor, t: Tensor | float, condition: Condition | None = None, *, features: Sequence[str] = ()
    ) -> Prediction:
        condition = Condition() if condition is None else condition
        if isinstance(features, Only):
            return super().forward(x_t, t, condition, features=features)
        prediction = super().forward(x_t, t, condition.for_teacher())
        if not features:
            return prediction
        return replace(prediction, features=self.activations(x_t, t, condition, features=features).features)

    def __deepcopy__(self, memo: dict[int, Any]) -> Denoiser:
        plain = Denoiser(
            self.network, self.call, self.schedule, self.parametrization, reads_guidance=self.reads_guidance
        )
        memo[id(self)] = twin = copy.deepcopy(plain, memo)
        return twin.train(self.training)
