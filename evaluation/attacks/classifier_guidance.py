"""Classifier guidance: leads sampling to the concept by a detector's gradient, without naming it."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sublimate.diffusion.predictions import Prediction, scaled
from sublimate.diffusion.samplers import ddim
from sublimate.evaluation.attack import Attack, Box, Case, Outcome
from sublimate.pipelines.generate import rendered
from sublimate.pipelines.model import Model
from sublimate.pipelines.sampling import Part, at_once, sample
from sublimate.training.config import Config


class ClassifierGuidanceConfig(Config):
    """Options of the guided sampling.

    Attributes:
        scale: of the gradient of log p(concept | x0 as predicted).
        words: what prompts say in the concept's place; the concept's anchor unless given.
        sampling_steps: DDIM steps.
        guidance_scale: of the prompt, 1 is none.
    """

    scale: float = Field(default=2.0, gt=0)
    words: str | None = None
    sampling_steps: int = Field(default=25, ge=1)
    guidance_scale: float = Field(default=1.0, ge=0)


class ClassifierGuidance(Attack):
    """eps' = eps - s sigma_t grad log p(concept | x0(x_t)): what still lies in the model is found without its name.

    Dhariwal & Nichol 2021, with the detector reading the decoded x0 of each step instead of the noise, as in universal
    guidance (arXiv 2302.07121). A gradient can also fool the detector, so look at the pictures: the base shows what
    success looks like.
    """

    Config = ClassifierGuidanceConfig
    paper: ClassVar[str] = "2105.05233"
    box: ClassVar[Box] = "white box"
    every_level: ClassVar[bool] = True
    differentiates: ClassVar[bool] = True
    renames: ClassVar[bool] = True

    @property
    def budget(self) -> str:
        return f"{self.config.sampling_steps} guided steps per image"

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        c = self.config
        prompts = case.renamed(case.prompts, case.concept.anchor if c.words is None else c.words)
        grid = model.schedule.grid(c.sampling_steps, model.backbone.grid_spacing)

        def led(part: Part) -> Tensor:
            def denoise(x_t: Tensor, t: Tensor) -> Prediction:
                x_t = x_t.detach().requires_grad_(True)
                with torch.enable_grad():
                    prediction = part.plain(x_t, t)
                    seen = case.probability(model.render(prediction.x0))
                    (gradient,) = torch.autograd.grad(seen.clamp_min(1e-8).log().sum(), x_t)
                return prediction.shifted(scaled(-c.scale * prediction.coefficients.sigma, gradient))

            x = ddim(denoise, model.schedule.noise_scale * part.z, model.schedule, grid)
            return rendered(model, x)

        images = sample(
            model,
            lambda rows: model.encode_prompts(prompts[rows]),
            led,
            len(prompts),
            null=model.null_condition(),
            scale=c.guidance_scale,
            seed=seed,
            batch_size=at_once(model.latent_shape, 32, cost=8),
            calls=c.sampling_steps,
            progress=progress,
        )
        return Outcome.seen(case, prompts, images)
