"""from_scheduler against diffusers' own tables, timesteps and noise levels."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from sublimate.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow, from_scheduler

DISCRETE = [
    diffusers.DDIMScheduler(),
    diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=200),
    diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    diffusers.EulerAncestralDiscreteScheduler(),
    diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True),
    diffusers.LCMScheduler(),
    diffusers.DDIMScheduler(trained_betas=[0.1, 0.2, 0.3]),
    diffusers.DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True),
    diffusers.DDPMScheduler(rescale_betas_zero_snr=True),
]


@pytest.mark.parametrize("scheduler", DISCRETE, ids=lambda s: type(s).__name__)
def test_table_is_that_of_diffusers_to_the_bit(scheduler):
    schedule = from_scheduler(scheduler)
    assert isinstance(schedule, DiscreteVP)
    assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod.double())
    assert schedule.zero_terminal == bool(scheduler.config.get("rescale_betas_zero_snr"))


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [2, 4, 7, 13, 25, 30, 50, 300, 1000])
def test_grid_is_that_of_diffusers(spacing, steps):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    grid = from_scheduler(scheduler).grid(steps, spacing)
    assert grid[:-1].tolist() == scheduler.timesteps.tolist()


def test_one_step_starts_from_pure_noise():
    schedule = from_scheduler(diffusers.DDIMScheduler())
    assert schedule.grid(1).tolist() == [999, -1]
    for spacing in ("leading", "linspace"):
        with pytest.raises(ValueError, match="trailing"):
            schedule.grid(1, spacing)


def test_flow_match_with_a_fixed_shift():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = from_scheduler(scheduler)
    assert isinstance(schedule, RectifiedFlow) and schedule.shift == 3
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6))
    torch.testing.assert_close(schedule.grid(6).float(), scheduler.sigmas)
    scheduler.set_timesteps(6)
    grid = schedule.grid(6, "linspace")
    torch.testing.assert_close(grid.float(), scheduler.sigmas)
    torch.testing.assert_close(schedule.network_time(grid[:-1]).float(), scheduler.timesteps)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_flow_match_whose_shift_depends_on_the_resolution(kind):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=9.0, time_shift_type=kind
    )
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5), mu=calculate_shift(64 * 48))
    schedule = from_scheduler(scheduler, (16, 128, 96))
    torch.testing.assert_close(schedule.grid(5).float(), scheduler.sigmas)
    scheduler.set_timesteps(5, mu=calculate_shift(64 * 48))
    torch.testing.assert_close(schedule.grid(5, "linspace").float(), scheduler.sigmas)
    with pytest.raises(ValueError, match="latent_shape"):
        from_scheduler(scheduler)


def test_solvers_of_flow_models():
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    schedule = from_scheduler(scheduler)
    assert isinstance(schedule, RectifiedFlow) and schedule.shift == 3


def test_edm():
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=50, rho=5)
    schedule = from_scheduler(scheduler)
    assert isinstance(schedule, EDM)
    scheduler.set_timesteps(6)
    grid = schedule.grid(6)
    torch.testing.assert_close(grid.float(), scheduler.sigmas)
    torch.testing.assert_close(schedule.network_time(grid[:-1]).float(), scheduler.timesteps)


def test_consistency_models_are_told_a_thousand_times_c_noise():
    scheduler = diffusers.CMStochasticIterativeScheduler()
    schedule = from_scheduler(scheduler)
    assert (schedule.t_min, schedule.t_max, schedule.rho) == (0.002, 80, 7)
    grid = schedule.grid(40)[:-1]
    torch.testing.assert_close(schedule.network_time(grid), scheduler.timesteps.double())


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.VQDiffusionScheduler(num_vec_classes=4), "VQDiffusionScheduler"),
        (diffusers.DDPMScheduler(beta_schedule="sigmoid"), "sigmoid"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), "continuous"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), "shift_terminal"),
    ],
)
def test_what_has_no_schedule_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        from_scheduler(scheduler)
