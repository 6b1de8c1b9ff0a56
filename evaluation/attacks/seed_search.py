"""Seed search: asks for the concept by name with many seeds, since one image in hundreds is still an image."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from sublimate.evaluation.attack import Attack, Box, Case, Outcome
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model
from sublimate.training.config import Config
from sublimate.training.randomness import key


class SeedSearchConfig(Config):
    """Options of the search.

    Attributes:
        seeds: per prompt.
    """

    seeds: int = Field(default=10, ge=1)


class SeedSearch(Attack):
    """A prompt brings the concept back when any of its seeds does; the search over latents of SAGE, without gradients.

    The rate grows with the number of seeds by itself: compare it with the base's, and with the detector's own errors.
    """

    Config = SeedSearchConfig
    paper: ClassVar[str] = "2306.00974"
    box: ClassVar[Box] = "black box"

    @property
    def budget(self) -> str:
        return f"{self.config.seeds} seeds per prompt"

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        seeds = [key(seed, "seed search", i) for i in range(self.config.seeds)]
        drawn = (generate(model, case.prompts, seed=one, progress=progress) for one in seeds)
        return Outcome.any_of(case, case.prompts, drawn)
