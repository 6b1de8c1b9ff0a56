"""Students of one or few steps as others publish them: stock folders whose scheduler says how they are sampled."""

from __future__ import annotations

import math
from typing import Any

from sublimate.diffusion.schedules import Schedule
from sublimate.pipelines.few_steps import FewSteps

LCM_STEPS, LCM_GUIDANCE = 4, 8.0
"""What the cards of latent consistency models recommend (Luo et al. 2023, arXiv 2310.04378)."""

_TURBO_SAMPLERS = {"EulerDiscreteScheduler": "ddim", "EulerAncestralDiscreteScheduler": "ancestral"}


def published_defaults(scheduler: Any, schedule: Schedule, *, told_guidance: bool) -> dict[str, Any]:
    """How a student wants to be sampled, from the scheduler it comes with; nothing for what is no student.

    `LCMScheduler` is made for consistency models alone: four calls on the grid they were trained on, told the guidance
    scale where the network has an input for it and unguided elsewhere. Stock blends its x0 with x_t by c_skip, below
    1e-5 at every time of that grid but the last few; ours does not.

    Euler's schedulers with trailing steps on noise prediction are what SDXL-Turbo, SD-Turbo (Sauer et al. 2023, arXiv
    2311.17042) and their like come with: one unguided call at the schedule's end, put in as stock does, with noise of
    standard deviation sigma instead of 1. More calls are drawn by the same steps as that scheduler's. A model of zero
    terminal SNR has trailing steps too (Lin et al. 2024, arXiv 2305.08891) and is none of them.

    Args:
        scheduler: the pipeline's.
        schedule: what it means.
        told_guidance: whether the network is told the guidance scale.

    Returns:
        Entries of `Model.defaults`.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    if kind == "LCMScheduler":
        scale = LCM_GUIDANCE if told_guidance else 1.0
        few = FewSteps(
            "consistency", LCM_STEPS, grid_steps=config.original_inference_steps, guidance_scale=scale
        ).to_dict()
        return _sampled(LCM_STEPS, scale, few_steps=few)
    if kind in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        # No student, but stock puts in noise of the deviation sqrt(sigma_max^2 + 1).
        return {"noise_scale": math.sqrt(1 + config.sigma_max**-2)}
    karras = any(config.get(f"use_{name}_sigmas") for name in ("karras", "exponential", "beta"))
    trailing = config.get("timestep_spacing") == "trailing" and not karras and not config.get("rescale_betas_zero_snr")
    if kind in _TURBO_SAMPLERS and trailing and config.get("prediction_type", "epsilon") == "epsilon":
        return _sampled(1, 1.0, sampler=_TURBO_SAMPLERS[kind], noise_scale=float(schedule.at(schedule.t_max).sigma))
    return {}


def _sampled(steps: int, scale: float, **more: Any) -> dict[str, Any]:
    call = {"num_inference_steps": steps, "guidance_scale": scale}
    return {"steps": steps, "guidance_scale": scale, "call": call, **more}
