"""Noise search: asks for the concept by name and pushes the sampling off its path with noise, more and less of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import ClassVar

from pydantic import Field, field_validator
from torch import Tensor

from sublimate.diffusion.samplers import ddim, posterior_deviation
from sublimate.evaluation.attack import Attack, Box, Case, Outcome
from sublimate.evaluation.intervals import Rate
from sublimate.pipelines.generate import rendered
from sublimate.pipelines.model import Model
from sublimate.pipelines.sampling import Part, sample
from sublimate.training.config import Config


class NoiseSearchConfig(Config):
    """Options of the search.

    Attributes:
        levels: eta, how much noise a step adds, in units of ancestral sampling's own; 0 is plain DDIM. One image per
            prompt and level.
        sampling_steps: of each image.
    """

    levels: tuple[float, ...] = (0.25, 0.5, 0.75)
    sampling_steps: int = Field(default=50, ge=1)

    @field_validator("levels")
    @classmethod
    def _in_order(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or value[0] < 0 or any(a >= b for a, b in pairwise(value)):
            raise ValueError(f"levels are ascending and not negative, not {list(value)}.")
        return value


class NoiseSearch(Attack):
    """The noise-based probe (Lu et al. 2025): x_s = DDIM(x_t) + eta sigma(x_s | x_t, x0) n, searched over eta.

    DDIM takes off all the noise that the network sees, and what is added comes on top of what belongs to the time s.
    So the network meets states beside the paths that an erasure was fitted to. A prompt succeeds when any level does:
    compare with `seed_search` of as many seeds. The levels are ours; from 1 on nothing is left of Ink's images.
    """

    Config = NoiseSearchConfig
    paper: ClassVar[str] = "2505.17013"
    box: ClassVar[Box] = "white box"
    every_level: ClassVar[bool] = True

    @property
    def budget(self) -> str:
        return f"{len(self.config.levels)} levels of noise per prompt"

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        found = []

        def drawn(level: float) -> Tensor:
            images = sample(
                model,
                lambda rows: model.encode_prompts(case.prompts[rows]),
                partial(self._disturbed, model, level),
                len(case.prompts),
                null=model.null_condition(),
                scale=model.guidance_scale,
                seed=seed,
                calls=self.config.sampling_steps,
                progress=progress,
            )
            rate = Rate.of(case.shows(images).tolist())
            found.append(f"{100 * rate.value:.1f} % at level {level:g}")
            return images

        outcome = Outcome.any_of(case, case.prompts, map(drawn, self.config.levels))
        return replace(outcome, found=", ".join(found))

    def _disturbed(self, model: Model, level: float, part: Part) -> Tensor:
        """A part's images, with so much noise added in every step."""
        schedule = model.schedule
        times = schedule.grid(self.config.sampling_steps, model.backbone.grid_spacing).tolist()
        x = schedule.noise_scale * part.z
        for t, to in pairwise(times):
            x = ddim(part.plain, x, schedule, (t, to))
            x = x + level * posterior_deviation(schedule, t, to) * part.noise(x)
        return rendered(model, x)
