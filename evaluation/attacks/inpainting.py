"""Inpainting: cuts a hole into pictures of the concept and lets the attacked model fill it, asked for it by name."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sublimate.diffusion.predictions import add_noise
from sublimate.diffusion.samplers import ddim
from sublimate.evaluation.attack import Attack, Box, Case, Outcome
from sublimate.evaluation.picture_attack import finished
from sublimate.pipelines.model import Model
from sublimate.pipelines.sampling import Part
from sublimate.training.config import Config


class InpaintingConfig(Config):
    """Options of the inpainting.

    Attributes:
        hole: side of the hole in the middle, as a share of the picture's own; 1 shows it nothing of the picture.
        sampling_steps: DDIM steps.
    """

    hole: float = Field(default=0.75, gt=0, le=1)
    sampling_steps: int = Field(default=50, ge=1)


class Inpainting(Attack):
    """The inpainting probe (Lu et al. 2025): what surrounds a concept may recall it where its name does not.

    Blended diffusion (Avrahami et al. 2022, arXiv 2111.14818): outside of the hole each step is followed by the
    picture itself at the same noise. A small hole leaves the concept visible: compare with what the outcome says of
    no prompt. The size of the hole is ours.
    """

    Config = InpaintingConfig
    paper: ClassVar[str] = "2505.17013"
    box: ClassVar[Box] = "white box"
    every_level: ClassVar[bool] = True

    @property
    def budget(self) -> str:
        return f"one filling per picture of a hole of {self.config.hole:g} of its sides"

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        schedule, steps = model.schedule, self.config.sampling_steps
        times = schedule.grid(steps, model.backbone.grid_spacing).tolist()
        hole = hole_of(model.latent_shape, self.config.hole).to(model.device)

        def fill(part: Part, x0: Tensor) -> Tensor:
            x = schedule.noise_scale * part.z
            for t, to in pairwise(times):
                x = ddim(part.plain, x, schedule, (t, to))
                x = torch.where(hole, x, add_noise(schedule, x0, part.z.to(x0), to))
            return x

        return finished(model, case, fill, seed=seed, calls=steps, progress=progress)


def hole_of(shape: tuple[int, ...], share: float) -> Tensor:
    """A rectangle in the middle, (height, width) bool, of at least one latent.

    Args:
        shape: (channels, height, width) of the latents.
        share: its sides as a share of theirs.
    """
    hole = torch.zeros(shape[-2:], dtype=torch.bool)
    sides = [max(1, round(share * side)) for side in shape[-2:]]
    (top, left) = ((whole - side) // 2 for whole, side in zip(shape[-2:], sides, strict=True))
    hole[top : top + sides[0], left : left + sides[1]] = True
    return hole
