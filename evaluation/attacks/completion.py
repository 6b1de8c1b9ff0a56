"""Completion: noises pictures of the concept and lets the attacked model finish them, asked for it by name."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from sublimate.diffusion.predictions import add_noise
from sublimate.diffusion.samplers import ddim
from sublimate.evaluation.attack import Attack, Box, Case, Outcome
from sublimate.evaluation.picture_attack import finished
from sublimate.pipelines.model import Model
from sublimate.pipelines.sampling import Part
from sublimate.training.config import Config


class CompletionConfig(Config):
    """Options of the completion.

    Attributes:
        strength: how much of the sampling the model does, as with img2img; 1 shows it nothing of the picture.
        sampling_steps: DDIM steps of a whole sampling.
    """

    strength: float = Field(default=0.8, gt=0, le=1)
    sampling_steps: int = Field(default=50, ge=2)


class Completion(Attack):
    """Diffusion completion (Lu et al. 2025): shown half a concept, does the model know how it goes on?

    At a low strength every model copies what it is shown: compare with what the outcome says of no prompt.
    """

    Config = CompletionConfig
    paper: ClassVar[str] = "2505.17013"
    box: ClassVar[Box] = "black box"
    every_level: ClassVar[bool] = True

    @property
    def budget(self) -> str:
        return f"one completion per picture at strength {self.config.strength}"

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        c, schedule = self.config, model.schedule
        whole = schedule.grid(c.sampling_steps, model.backbone.grid_spacing)
        grid = whole[c.sampling_steps - max(1, round(c.strength * c.sampling_steps)) :]

        def finish(part: Part, x0: Tensor) -> Tensor:
            return ddim(part.plain, add_noise(schedule, x0, part.z, float(grid[0])), schedule, grid)

        return finished(model, case, finish, seed=seed, calls=len(grid) - 1, progress=progress)
