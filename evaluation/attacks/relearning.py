"""Relearning: trains an adapter on a few pictures of the concept, and watches how fast it is back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from sublimate.evaluation.attack import Case
from sublimate.evaluation.tuning_attack import TuningAttack


class Relearning(TuningAttack):
    """Fine-tuning on the concept itself (Suriyakumar et al. 2024): any model can learn it, so the speed counts."""

    paper: ClassVar[str] = "2410.08074"

    def lessons(self, case: Case, seed: int) -> tuple[Sequence[str], Tensor]:
        return case.captions[: self.config.pictures], case.pictures[: self.config.pictures]
