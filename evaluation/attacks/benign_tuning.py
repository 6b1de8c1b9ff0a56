"""Benign tuning: trains an adapter on pictures of other things, after which the concept may be back unasked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from sublimate.evaluation.attack import Case
from sublimate.evaluation.tuning_attack import TuningAttack
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model
from sublimate.training.randomness import key


class BenignTuning(TuningAttack):
    """Fine-tuning on what the base draws for unrelated prompts: concept resurgence (Suriyakumar et al. 2024)."""

    paper: ClassVar[str] = "2410.08074"

    def out_of_place(self, model: Model, case: Case) -> str:
        return super().out_of_place(model, case) if case.others else "the study has no unrelated prompts"

    def lessons(self, case: Case, seed: int) -> tuple[Sequence[str], Tensor]:
        captions = case.others[: self.config.pictures]
        return captions, generate(case.base, captions, seed=key(seed, self.name()))
