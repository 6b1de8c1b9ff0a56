"""Completion: noises pictures of the concept and lets the attacked model finish them, asked for it by name."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.predictions import Prediction, add_noise
from sublimate.diffusion.samplers import ddim
from sublimate.evaluation.attack import Attack, Box, Case, Outcome, pictured
from sublimate.evaluation.intervals import Rate
from sublimate.pipelines.generate import initial_noise
from sublimate.pipelines.model import Model
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

    At a low strength every model copies what it is shown. So each picture is also finished without a prompt, and the
    outcome says how often the concept is there then: what lies above that is the model's own.
    """

    Config = CompletionConfig
    paper: ClassVar[str] = "2505.17013"
    box: ClassVar[Box] = "black box"
    every_level: ClassVar[bool] = True

    @property
    def budget(self) -> str:
        return f"one completion per picture at strength {self.config.strength}"

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        c, schedule, null = self.config, model.schedule, model.null_condition()
        whole = schedule.grid(c.sampling_steps, model.backbone.grid_spacing)
        grid = whole[c.sampling_steps - max(1, round(c.strength * c.sampling_steps)) :]
        named: list[Tensor] = []
        unnamed: list[Tensor] = []
        for start in range(0, len(case.pictures), 32):
            part = slice(start, start + 32)
            x0 = pictured(model, case.pictures[part])
            eps = initial_noise(model.latent_shape, seed, range(start, start + len(x0))).to(x0.device)
            x_t = add_noise(schedule, x0, eps, float(grid[0]))
            with torch.no_grad():
                told = model.encode_prompts(case.captions[part])
                for finished, condition, scale in ((named, told, model.guidance_scale), (unnamed, null, 1.0)):
                    denoise = partial(_denoise, model, condition.expand(len(x0)), null, scale)
                    finished.append(model.render(ddim(denoise, x_t, schedule, grid)))
        copied = Rate.of(case.shows(torch.cat(unnamed)).tolist())
        images = torch.cat(named)
        return Outcome.seen(case, case.captions, images, found=f"without a prompt: {copied}")


def _denoise(model: Model, condition: Condition, null: Condition, scale: float, x_t: Tensor, t: Tensor) -> Prediction:
    return guided(model.denoiser, x_t, t, condition, null, scale)
