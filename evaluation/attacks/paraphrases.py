"""Paraphrases: asks for the concept in other words."""

from __future__ import annotations

from typing import ClassVar

from sublimate.evaluation.attack import Attack, Box, Case, Outcome
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model
from sublimate.training.config import Config


class Paraphrases(Attack):
    """MACE's generality: prompts that mean the concept in other words than training saw (Lu et al. 2024)."""

    Config = Config
    paper: ClassVar[str] = "2403.06135"
    box: ClassVar[Box] = "black box"

    @property
    def budget(self) -> str:
        return "one image per paraphrase"

    def out_of_place(self, model: Model, case: Case) -> str:
        return "" if case.paraphrases else "the study has no prompts that mean the concept in other words"

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        return Outcome.seen(case, case.paraphrases, generate(model, case.paraphrases, seed=seed, progress=progress))
