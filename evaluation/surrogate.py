"""Images in a few differentiable steps, for attacks that follow a detector's gradient through the sampling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sublimate.diffusion.guidance import guided
from sublimate.diffusion.predictions import Prediction
from sublimate.diffusion.samplers import ddim
from sublimate.evaluation.attack import Case
from sublimate.pipelines.model import Model


def concept_loss(model: Model, case: Case, prompts: Sequence[str], z: Tensor, steps: int) -> Tensor:
    """-log p(concept | image) of a few DDIM steps, differentiable in z and in what encodes the prompts.

    SAGE (Liu et al. 2024) shortcuts the gradient of a whole sampling; here the sampling itself is short.

    Args:
        model: draws.
        case: whose detector judges.
        prompts: one per sample.
        z: (batch, *latent_shape) N(0, I).
        steps: of the sampling.

    Returns:
        (batch,).
    """
    grid = model.schedule.grid(steps, model.backbone.grid_spacing)
    told, null = model.encode_prompts(prompts), model.null_condition()

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return guided(model.denoiser, x_t, t, told, null, model.guidance_scale)

    x0 = ddim(denoise, model.schedule.start_scale(float(grid[0])) * z, model.schedule, grid)
    return -case.probability(model.render(x0)).clamp_min(1e-8).log()
