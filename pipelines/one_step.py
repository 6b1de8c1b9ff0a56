"""Stock schedulers that turn a one-step student's output into exactly its x0."""

from __future__ import annotations

from typing import Any

from diffusers import CMStochasticIterativeScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

_NOISE_OPTIONS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def noise_options(scheduler: Any) -> dict[str, Any]:
    """What a scheduler over discrete betas says of its noise levels.

    Raises:
        ValueError: for another scheduler.
    """
    if "trained_betas" not in scheduler.config:
        raise ValueError(
            f"{type(scheduler).__name__} has no table of betas, which the stock schedulers of students are made from: "
            "such a model can be drawn and edited, but not distilled."
        )
    return {name: scheduler.config[name] for name in _NOISE_OPTIONS if name in scheduler.config}


def discrete_betas(scheduler: Any) -> Tensor:
    """A scheduler's betas, (num_train_timesteps,) float32."""
    return DDIMScheduler.from_config(noise_options(scheduler)).betas


def ddim_at(scheduler: Any, t: float | None = None) -> DDIMScheduler:
    """A DDIM scheduler whose single trailing step goes from t to x0.

    A trailing grid starts at the table's last entry, so a student that starts at an earlier t gets a table that ends
    there: the same betas, cut off.

    Args:
        scheduler: a scheduler over discrete betas.
        t: a whole time of its table; the last unless given.

    Raises:
        ValueError: for a t that is not a whole time of the table.
    """
    config, betas = noise_options(scheduler), discrete_betas(scheduler)
    last = len(betas) - 1
    if t is not None and (t != int(t) or not 0 < t <= last):
        raise ValueError(f"A one-step student of this schedule starts at a whole time in 1..{last}, not at {t}.")
    if t is not None and t < last:
        steps = int(t) + 1
        config = {"num_train_timesteps": steps, "trained_betas": betas[:steps].tolist()}
    return DDIMScheduler.from_config(
        config,
        prediction_type=scheduler.config.get("prediction_type", "epsilon"),
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        # Not used by trailing grids; any other value makes StableDiffusionPipeline complain.
        steps_offset=1,
    )


def flow_options(scheduler: Any) -> dict[str, Any]:
    """What a scheduler of a flow says of it, as `FlowMatchEulerDiscreteScheduler` takes it.

    Args:
        scheduler: a `FlowMatchEulerDiscreteScheduler`, or a multistep one with `use_flow_sigmas`.
    """
    config = scheduler.config
    if config.get("use_flow_sigmas"):
        return {"num_train_timesteps": config["num_train_timesteps"], "shift": config["flow_shift"]}
    # These would move the times that a student is told to be called at.
    return {**config, **{f"use_{name}_sigmas": False for name in ("karras", "exponential", "beta")}}


def flow_at(scheduler: Any, t: float | None = None) -> tuple[FlowMatchEulerDiscreteScheduler, dict[str, Any]]:
    """A flow scheduler whose single Euler step goes from t to x0, and the call's options that say so.

    Args:
        scheduler: as in `flow_options`.
        t: in (0, 1]; 1 unless given. Stock schedulers start at 1, any other t is passed as `sigmas=[t]`.

    Raises:
        ValueError: for a t outside (0, 1].
    """
    t = 1.0 if t is None else float(t)
    if not 0 < t <= 1:
        raise ValueError(f"A one-step student of a flow starts within (0, 1], not at {t}.")
    if t == 1:
        return FlowMatchEulerDiscreteScheduler.from_config(flow_options(scheduler)), {"num_inference_steps": 1}
    # Unshifted, so that the sigma of the call is the sigma of the step.
    unshifted = {**flow_options(scheduler), "shift": 1.0, "use_dynamic_shifting": False}
    return FlowMatchEulerDiscreteScheduler.from_config(unshifted), {"num_inference_steps": 1, "sigmas": [t]}


def consistency_at(scheduler: Any, t: float | None = None) -> CMStochasticIterativeScheduler:
    """A consistency scheduler whose single step gives EDM's x0 at sigma = t.

    Its coefficients (Song et al. 2023, appendix C) are EDM's with sigma replaced by sigma - sigma_min, so they agree
    exactly for sigma_min = 0.

    Args:
        scheduler: a `CMStochasticIterativeScheduler`.
        t: the noise level; the scheduler's sigma_max unless given.

    Raises:
        ValueError: for a level that is not positive.
    """
    t = float(scheduler.config.sigma_max if t is None else t)
    if t <= 0:
        raise ValueError(f"A one-step student starts at a positive noise level, not at {t}.")
    return CMStochasticIterativeScheduler.from_config(
        scheduler.config, sigma_min=0.0, sigma_max=t, clip_denoised=False
    )
