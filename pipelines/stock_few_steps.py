"""Stock schedulers that sample as a few-step student does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffusers import (
    CMStochasticIterativeScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from sublimate.diffusion.schedules import RectifiedFlow, Schedule
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.one_step import discrete_betas, flow_options, noise_options

_FINE_GRID = 2**16
"""Times of a consistency scheduler: every noise level is within 1e-4 of one of them."""


def table_sampling(scheduler: Any, schedule: Schedule, few: FewSteps) -> tuple[Any, dict[str, Any]]:
    """The scheduler over discrete betas that samples like `few`, and the call's options that say so.

    "consistency" is `LCMScheduler`, "target_driven" is `TCDScheduler`. A "trajectory" cannot be told its target by a
    stock pipeline, except clean data: it is sampled with gamma = 1, which is "consistency".

    Args:
        scheduler: a scheduler over discrete betas.
        schedule: what it means.
        few: the sampling.

    Raises:
        ValueError: for clipped calls or times between the table's, which these schedulers do not have.
    """
    _refuse_clipping(few)
    times = [int(t) for t in few.call_times(schedule)]
    if tuple(times) != few.call_times(schedule):
        raise ValueError(f"Stock schedulers know whole times of the table only, not {list(few.call_times(schedule))}.")
    shared = {
        "prediction_type": scheduler.config.get("prediction_type", "epsilon"),
        "original_inference_steps": few.grid_steps or scheduler.config.num_train_timesteps,
        # Not used by these grids; any other value makes StableDiffusionPipeline complain.
        "steps_offset": 1,
    }
    call: dict[str, Any]
    if few.sampler == "target_driven" and few.eta < 1:
        stock = TCDScheduler.from_config(_clean_at_zero(scheduler), **shared)
        call = {"eta": few.eta}
    else:
        # LCM's output is c_skip x_t + c_out x0 with c_skip = .25/((scaling t)^2 + .25): at this scaling c_out is 1.
        stock = LCMScheduler.from_config(
            noise_options(scheduler), **shared, timestep_scaling=1e5, clip_sample=False, set_alpha_to_one=True
        )
        call = {}
    stock.set_timesteps(few.steps)
    if stock.timesteps.tolist() != times:
        return stock, {"timesteps": times, **call}
    return stock, {"num_inference_steps": few.steps, **call}


def _clean_at_zero(scheduler: Any) -> dict[str, Any]:
    """The same table with t = 0 made clean: `TCDScheduler` ends there, and would leave a little noise in x0."""
    betas = discrete_betas(scheduler)
    # The second beta makes up for the first, so that every later level stays.
    second = float(1 - (1 - betas[0]) * (1 - betas[1]))
    return {"num_train_timesteps": len(betas), "trained_betas": [0.0, second, *betas[2:].tolist()]}


def steps_alone(pipeline_class: str, call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The call's options, for a stock pipeline that is told the number of steps and nothing else of the sampling.

    Raises:
        ValueError: for options that it does not have.
    """
    if others := sorted(call.keys() - {"num_inference_steps"}):
        raise ValueError(
            f"{pipeline_class} cannot be told {' or '.join(others)}: sample by consistency (eta 1), at times of the "
            "table's own grid."
        )
    return call


def flow_sampling(
    scheduler: Any, schedule: Schedule, few: FewSteps
) -> tuple[FlowMatchEulerDiscreteScheduler, dict[str, Any]]:
    """A flow scheduler that samples like `few`: Euler's steps for eta = 0, `stochastic_sampling` for eta = 1.

    A "trajectory" cannot be told its target, except clean data, and is sampled with gamma = 1.

    Args:
        scheduler: as in `flow_options`.
        schedule: what it means.
        few: the sampling.

    Raises:
        ValueError: for another eta or clipped calls, which this scheduler does not have.
    """
    _refuse_clipping(few)
    if not isinstance(schedule, RectifiedFlow):
        raise ValueError(f"{type(scheduler).__name__} is no scheduler of a flow.")
    fresh = few.sampler != "target_driven" or few.eta == 1
    if not fresh and few.eta > 0 and few.steps > 1:
        raise ValueError(f"No stock flow scheduler jumps with eta {few.eta}: set eta to 0 or 1.")
    stock = FlowMatchEulerDiscreteScheduler.from_config(
        {**flow_options(scheduler), "shift": schedule.shift},
        use_dynamic_shifting=False,
        stochastic_sampling=fresh,
    )
    # The scheduler shifts what it is given: Esser et al. 2024, eq. 23, backwards.
    sigmas = [t / (schedule.shift - (schedule.shift - 1) * t) for t in few.call_times(schedule)]
    return stock, {"num_inference_steps": few.steps, "sigmas": sigmas}


def consistency_sampling(
    scheduler: Any, schedule: Schedule, few: FewSteps
) -> tuple[CMStochasticIterativeScheduler, dict[str, Any], FewSteps]:
    """A consistency scheduler that samples like `few`, and `few` with its times as that scheduler rounds them.

    Args:
        scheduler: a `CMStochasticIterativeScheduler`.
        schedule: what it means.
        few: the sampling.

    Raises:
        ValueError: for jumps that end above clean data or clipped calls, which this scheduler does not have.
    """
    _refuse_clipping(few)
    if few.sampler != "consistency" and few.eta < 1 and few.steps > 1:
        raise ValueError(f"No stock consistency scheduler jumps with eta {few.eta}: set eta to 1.")
    times, rho = few.call_times(schedule), scheduler.config.rho
    stock = CMStochasticIterativeScheduler.from_config(
        scheduler.config, num_train_timesteps=_FINE_GRID, sigma_min=0.0, sigma_max=times[0], clip_denoised=False
    )
    # Karras et al. 2022, eq. 5 with sigma_min = 0, backwards; this scheduler lists its times from clean to noisy.
    ramp = [round((1 - (t / times[0]) ** (1 / rho)) * (_FINE_GRID - 1)) for t in times]
    stock.set_timesteps(timesteps=ramp[::-1])
    rounded = replace(few, times=(times[0], *stock.sigmas.tolist()[1:-1]))
    call = {"num_inference_steps": 1} if few.steps == 1 else {"timesteps": ramp[::-1]}
    return stock, call, rounded


def _refuse_clipping(few: FewSteps) -> None:
    if few.clipped_calls:
        raise ValueError("No stock scheduler clips x0 in the first calls only: leave out clipped_calls for an export.")
