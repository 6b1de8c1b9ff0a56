"""Samplers against diffusers, closed-form ODE solutions and exact posteriors."""

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch

from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from sublimate.diffusion.predictions import Parametrization, Prediction
from sublimate.diffusion.samplers import consistency, ddim, dynamic_threshold, euler, heun, jumps, one_step
from sublimate.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow, TrigFlow, from_scheduler

TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
SCHEDULES = {"discrete": DiscreteVP(TABLE), "edm": EDM(), "flow": RectifiedFlow(), "trig": TrigFlow(0.5)}
EVERY = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
MEAN, STD = 0.7, 0.4


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def call_unet(network, x, t, condition, features):
    return network(x, t).sample, {}


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        add_attention=False,
    ).requires_grad_(False)


class Steps:
    """Denoises, and keeps what it was asked at each step."""

    def __init__(self, denoiser):
        self.denoiser, self.x, self.t, self.output = denoiser, [], [], []

    def __call__(self, x, t):
        prediction = self.denoiser(x, t)
        self.x.append(x)
        self.t.append(t)
        self.output.append(prediction.output)
        return prediction


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_is_that_of_diffusers_step_by_step(unet, kind, eta):
    # 8 divides 1000: otherwise diffusers steps to t - 1000 // steps, which is not the next time of its own grid.
    scheduler = diffusers.DDIMScheduler(prediction_type=kind, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(8)
    schedule = from_scheduler(scheduler)
    # The same table in float64, so that the comparison can be tight.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    denoise = Steps(Denoiser(unet.double(), call_unet, schedule, Parametrization(kind)))
    noises = [normal(i, 2, 1, 4, 4) for i in range(8)]
    pending = iter(noises)
    z = normal(9, 2, 1, 4, 4)
    x = ddim(denoise, z, schedule, schedule.grid(8), eta=eta, noise=lambda x: next(pending))

    expected = z
    for i, t in enumerate(scheduler.timesteps):
        assert (denoise.t[i] == t).all()
        torch.testing.assert_close(denoise.x[i], expected, rtol=1e-9, atol=1e-9)
        expected = scheduler.step(
            denoise.output[i], t, expected, eta=eta, variance_noise=noises[i] if eta else None
        ).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def test_euler_is_that_of_diffusers_on_a_flow(unet):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6))
    schedule = from_scheduler(scheduler)
    denoise = Steps(Denoiser(unet.float(), call_unet, schedule, Parametrization("flow")))
    z = normal(9, 2, 1, 4, 4).float()
    x = euler(denoise, z, schedule, schedule.grid(6))
    expected = z
    for i, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(denoise.x[i], expected, rtol=1e-5, atol=1e-5)
        expected = scheduler.step(denoise.output[i], t, expected).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_euler_is_that_of_diffusers_on_edm(unet):
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(6)
    schedule = from_scheduler(scheduler)
    denoise = Steps(Denoiser(unet.float(), call_unet, schedule, Parametrization("edm", 0.5)))
    z = 80 * normal(9, 2, 1, 4, 4).float()
    x = euler(denoise, z, schedule, schedule.grid(6))
    expected = z
    for i, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(denoise.x[i], expected, rtol=1e-4, atol=1e-4)
        scheduler.scale_model_input(expected, t)
        expected = scheduler.step(denoise.output[i], t, expected).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def gaussian(schedule, mean=MEAN, std=STD):
    mixture = GaussianMixture(torch.ones(1), torch.tensor([[mean]]), torch.tensor([std]))
    return MixtureDenoiser(mixture.double(), schedule)


def exact_solution(schedule, x, start, end):
    """The probability-flow ODE of N(m, s^2) keeps (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2)."""
    mean, std = float(torch.tensor(MEAN)), float(torch.tensor(STD))
    a, b = schedule.at(start), schedule.at(end)
    spread = [torch.sqrt((c.alpha * std) ** 2 + c.sigma**2) for c in (a, b)]
    return b.alpha * mean + (x - a.alpha * mean) * spread[1] / spread[0]


def between(schedule, steps):
    """A grid that stays where the noise is; the ends of the range are other tests' matter."""
    low, high = {DiscreteVP: (100.0, 900.0), EDM: (0.1, 20.0), RectifiedFlow: (0.1, 0.95), TrigFlow: (0.1, 1.5)}[
        type(schedule)
    ]
    if isinstance(schedule, EDM):
        return torch.logspace(math.log10(high), math.log10(low), steps + 1, dtype=torch.float64)
    return torch.linspace(high, low, steps + 1, dtype=torch.float64)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(schedule, sampler, order):
    denoiser, x = gaussian(schedule), 3 * normal(0, 5, 1)
    errors = []
    for steps in (32, 64, 128):
        grid = between(schedule, steps)
        found = sampler(denoiser, x, schedule, grid)
        errors.append(float((found - exact_solution(schedule, x, grid[0], grid[-1])).abs().max()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.2)


@pytest.mark.slow
@EVERY
def test_whole_range_ends_on_the_data(schedule):
    z = normal(0, 4, 1)
    x = schedule.noise_scale * z
    expected = exact_solution(schedule, x, schedule.t_max, schedule.t_clean)
    for sampler, tolerance in ((euler, 2e-2), (heun, 2e-3)):
        found = sampler(gaussian(schedule), x, schedule, schedule.grid(200))
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@EVERY
def test_euler_agrees_with_ddim_everywhere(schedule):
    x, grid = schedule.noise_scale * normal(0, 4, 1), schedule.grid(9)
    denoiser = gaussian(schedule)
    torch.testing.assert_close(euler(denoiser, x, schedule, grid), ddim(denoiser, x, schedule, grid))


def test_heun_on_edm_is_algorithm_1():
    """Karras et al. 2022, algorithm 1 with gamma = 0, written out in D and sigma."""
    schedule, grid = EDM(0.02, 10), EDM(0.02, 10).grid(5)
    denoiser, x = gaussian(schedule), normal(0, 3, 1) * 10
    calls = Steps(denoiser)
    found = heun(calls, x, schedule, grid)
    assert len(calls.t) == 2 * 5 - 1
    for t, to in itertools.pairwise(grid):
        d = (x - denoiser(x, t).x0) / t
        ahead = x + (to - t) * d
        if to > 0:
            ahead = x + (to - t) * (d / 2 + (ahead - denoiser(ahead, to).x0) / (2 * to))
        x = ahead
    torch.testing.assert_close(found, x)


@EVERY
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_eta_keeps_the_noise_level(schedule, eta):
    """With data in one point every step's noise adds up to sigma, whatever part of it is fresh."""
    denoiser = gaussian(schedule, std=1e-9)
    mean = float(torch.tensor(MEAN))
    grid = schedule.grid(8)[2:4]
    a, b = schedule.at(grid[0]), schedule.at(grid[1])
    kept = ddim(denoiser, (a.alpha * mean + a.sigma).expand(1, 1), schedule, grid, eta=eta, noise=torch.zeros_like)
    both = ddim(denoiser, (a.alpha * mean + a.sigma).expand(1, 1), schedule, grid, eta=eta, noise=torch.ones_like)
    kept, fresh = (kept - b.alpha * mean).squeeze(), (both - kept).squeeze()
    torch.testing.assert_close(kept**2 + fresh**2, b.sigma**2)
    if eta == 1:
        # Gaussian posterior q(x_s | x_t, x0): variance sigma_s^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2).
        torch.testing.assert_close(fresh**2, b.sigma**2 * (1 - (a.alpha * b.sigma / (b.alpha * a.sigma)) ** 2))


@EVERY
def test_one_step(schedule):
    z = normal(0, 4, 1)
    calls = Steps(gaussian(schedule))
    found = one_step(calls, z, schedule)
    assert torch.equal(calls.x[0], schedule.noise_scale * z) and (calls.t[0] == schedule.t_max).all()
    assert torch.equal(found, calls.denoiser(schedule.noise_scale * z, schedule.t_max).x0)


def test_one_step_from_a_lower_noise_level():
    calls = Steps(gaussian(EDM()))
    z = normal(0, 4, 1)
    one_step(calls, z, EDM(), 2.5)
    assert torch.equal(calls.x[0], 2.5 * z) and (calls.t[0] == 2.5).all()


def consistency_function(schedule):
    """The exact one of N(m, s^2): where the ODE's solution through (x, t) starts."""

    def denoise(x, t):
        x0 = exact_solution(schedule, x, t[:, None], torch.tensor(schedule.t_clean))
        return Prediction(x, x0, schedule.at(t), Parametrization("sample"))

    return denoise


@EVERY
def test_consistency_sampling(schedule):
    """Algorithm 1 of Song et al. 2023 written out; the samples keep the data's law at every number of steps."""
    times = schedule.grid(4)[:-1]
    z, draws = normal(0, 5, 1), [normal(i, 5, 1) for i in (1, 2, 3)]
    pending = iter(draws)
    found = consistency(consistency_function(schedule), z, schedule, times, lambda x: next(pending))
    x = schedule.noise_scale * z
    x0 = exact_solution(schedule, x, times[0], torch.tensor(schedule.t_clean))
    for t, n in zip(times[1:], draws, strict=True):
        c = schedule.at(t)
        x0 = exact_solution(schedule, c.alpha * x0 + c.sigma * n, t, torch.tensor(schedule.t_clean))
    torch.testing.assert_close(found, x0)
    assert next(pending, None) is None


def test_consistency_with_one_time_is_one_step():
    schedule = EDM()
    z = normal(0, 5, 1)
    f = consistency_function(schedule)
    for t in (80.0, 2.5):
        assert torch.equal(consistency(f, z, schedule, [t], torch.zeros_like), one_step(f, z, schedule, t))


def test_samplers_are_differentiable():
    schedule = RectifiedFlow()
    z = normal(0, 3, 1).requires_grad_(True)
    heun(gaussian(schedule), z, schedule, schedule.grid(3)).sum().backward()
    assert (z.grad.abs() > 0).all()


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (([1.0, 0.5, 0.0],), {"eta": 0.5}),
        (([1.0, 0.5, 0.0],), {"eta": -1.0, "noise": torch.zeros_like}),
        (([0.0, 0.5, 1.0],), {}),
        (([1.0, 1.0, 0.0],), {}),
        (([1.0],), {}),
    ],
)
def test_bad_input_is_refused(arguments, options):
    schedule = RectifiedFlow()
    with pytest.raises(ValueError):
        ddim(gaussian(schedule), torch.zeros(1, 1), schedule, *arguments, **options)


def test_consistency_needs_a_time():
    with pytest.raises(ValueError, match="at least 1"):
        consistency(gaussian(EDM()), torch.zeros(1, 1), EDM(), [], torch.zeros_like)


@EVERY
def test_jumps_by_the_exact_eps_compose(schedule):
    """With one clean point the network's x0 and eps are the same everywhere on a trajectory."""
    point = GaussianMixture(torch.ones(1), torch.full((1, 1), MEAN), torch.zeros(1)).double()
    denoiser = MixtureDenoiser(point, schedule)

    def jump(x, t, s):
        c = schedule.at(s)
        return denoiser(x, t).combine(c.alpha, c.sigma)

    start, middle, end = (schedule.uniform_time(torch.full((3,), u)) for u in (0.9, 0.6, 0.2))
    x = normal(1, 3, 1)
    torch.testing.assert_close(jump(x, start, start), x, rtol=1e-9, atol=1e-9)
    twice = jump(jump(x, start, middle), middle, end)
    torch.testing.assert_close(twice, jump(x, start, end), rtol=1e-9, atol=1e-9)


@EVERY
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_fresh_noise_restores_the_level_after_a_jump(schedule, share):
    """Jumps that keep the marginals N(alpha m, alpha^2 s^2 + sigma^2) end at the data's own distribution."""
    times = schedule.grid(4)[:-1].tolist()
    targets = [t + share * (schedule.t_clean - t) for t in times[1:]] + [schedule.t_clean]
    draws, seen = iter(range(2, 9)), []

    def jump(x, t, s):
        (c, to), moved = (schedule.at(t), schedule.at(s)), STD**2
        seen.append((t, x))
        spread = ((to.alpha**2 * moved + to.sigma**2) / (c.alpha**2 * moved + c.sigma**2)).sqrt()
        return to.alpha[:, None] * MEAN + spread[:, None] * (x - c.alpha[:, None] * MEAN)

    n = 20_000
    x0 = jumps(jump, normal(1, n, 1), schedule, times, targets, lambda x: normal(next(draws), *x.shape))
    for t, x in [*seen[1:], (torch.full((n,), schedule.t_clean), x0)]:
        c = schedule.at(t[0])
        std = float((c.alpha**2 * STD**2 + c.sigma**2).sqrt())
        assert abs(float(x.mean() - c.alpha * MEAN)) < 0.03 * std
        assert abs(float(x.std()) / std - 1) < 0.02
    assert next(draws) == (2 if share == 0 else 5)


def test_jumps_that_end_too_high_are_refused():
    schedule = SCHEDULES["flow"]
    for targets in ([0.5], [0.6, 0.0], [0.5, 0.1]):
        with pytest.raises(ValueError, match="need one target each"):
            jumps(lambda x, t, s: x, normal(0, 1, 1), schedule, [1.0, 0.5], targets, torch.randn_like)


@pytest.mark.parametrize("limit", [1.0, 3.0])
def test_dynamic_threshold_is_that_of_diffusers(limit):
    stock = diffusers.DDIMScheduler(thresholding=True, sample_max_value=limit)
    x0 = 2 * normal(3, 4, 3, 8, 8)
    torch.testing.assert_close(dynamic_threshold(x0, limit=limit), stock._threshold_sample(x0), rtol=1e-6, atol=1e-6)
