"""Students of one or few steps, as they are published: with stock schedulers and no word of this library."""

from __future__ import annotations

from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from checkpoints.sdxl import sdxl
from checkpoints.stable_diffusion import NOISE, stable_diffusion


def tiny_lcm() -> LatentConsistencyModelPipeline:
    """A latent consistency model of Stable Diffusion 1.x, which is told the guidance scale."""
    return stable_diffusion(
        "epsilon", LatentConsistencyModelPipeline, scheduler=LCMScheduler(**NOISE), time_cond_proj_dim=32
    )


def tiny_sdxl_lcm() -> StableDiffusionXLPipeline:
    """The same of Stable Diffusion XL."""
    return sdxl(LCMScheduler(**NOISE), time_cond_proj_dim=32)


def tiny_sd_turbo() -> StableDiffusionPipeline:
    """SD-Turbo: noise prediction, Euler with trailing steps."""
    return stable_diffusion("epsilon", scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing"))


def tiny_sdxl_turbo() -> StableDiffusionXLPipeline:
    """SDXL-Turbo: the same, with Euler's ancestral steps."""
    return sdxl(EulerAncestralDiscreteScheduler(**NOISE, timestep_spacing="trailing"))
