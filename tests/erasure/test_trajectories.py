"""Sources of x_t against full sampling and the closed form of noising."""

import pytest
import torch

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.predictions import Parametrization
from sublimate.diffusion.samplers import ddim
from sublimate.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow
from sublimate.erasure import trajectories

NULL = Condition(text=torch.zeros(1, 3))
CONDITION = Condition(text=torch.randn(4, 3, generator=torch.Generator().manual_seed(1)))


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = torch.nn.Parameter(torch.randn(3, 3, generator=generator))
        self.calls = 0

    def forward(self, x, t, c):
        self.calls += len(x)
        return torch.tanh(x @ self.a.T + c + 1e-3 * t[:, None])


def make(schedule, kind):
    return Denoiser(Network(), lambda n, x, t, c, features: (n(x, t, c["text"]), {}), schedule, Parametrization(kind))


VP = make(DiscreteVP(torch.linspace(0.9999, 0.01, 1000, dtype=torch.float64)), "epsilon")
KARRAS = make(EDM(sigma_min=0.002, sigma_max=80.0), "edm")
FLOW = make(RectifiedFlow(shift=3.0), "flow")


@pytest.mark.parametrize(
    ("denoiser", "spacing"),
    [(VP, "trailing"), (FLOW, "trailing"), (FLOW, "linspace"), (KARRAS, KARRAS.schedule.spacings[0])],
)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_each_sample_stops_at_its_own_step_of_the_full_sampling(denoiser, spacing, scale):
    z, stops = torch.randn(4, 3, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 0, 9, 5])
    kept, grid = z.clone(), denoiser.schedule.grid(10, spacing)
    x_t, t = trajectories.rollout(denoiser, z, CONDITION, NULL, stops, grid, guidance_scale=scale)
    for i, stop in enumerate(stops.tolist()):
        told = CONDITION.index(i)
        expected = denoiser.schedule.start_scale(denoiser.schedule.t_max) * z[i : i + 1]
        if stop:
            walk = grid[: stop + 1]
            expected = ddim(
                lambda x, t, told=told: guided(denoiser, x, t, told, NULL, scale), expected, denoiser.schedule, walk
            )
        torch.testing.assert_close(x_t[i : i + 1], expected)
        assert t[i] == grid[stop]
    assert torch.equal(z, kept) and not x_t.requires_grad


@pytest.mark.parametrize("denoiser", [VP, FLOW, KARRAS])
def test_one_sampling_serves_several_stops(denoiser):
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    stops, grid = torch.tensor([[3, 0, 9, 5], [4, 2, 1, 5], [0, 7, 8, 6]]), denoiser.schedule.grid(10)
    x_t, t = trajectories.rollout(denoiser, z, CONDITION, NULL, stops, grid, guidance_scale=3.0)
    assert x_t.shape == (3, 4, 3) and t.shape == (3, 4)
    for row, own in enumerate(stops):
        expected, times = trajectories.rollout(denoiser, z, CONDITION, NULL, own, grid, guidance_scale=3.0)
        torch.testing.assert_close(x_t[row], expected)
        assert torch.equal(t[row], times)
    VP.network.calls = 0
    trajectories.rollout(VP, z, CONDITION, NULL, stops, VP.schedule.grid(10), guidance_scale=1.0)
    assert VP.network.calls == 4 + 7 + 9 + 6


def test_only_running_samples_cost_passes():
    VP.network.calls = 0
    z, stops = torch.zeros(4, 3), torch.tensor([3, 0, 9, 5])
    trajectories.rollout(VP, z, CONDITION, NULL, stops, VP.schedule.grid(10), guidance_scale=3.0)
    assert VP.network.calls == 2 * (3 + 0 + 9 + 5)


@pytest.mark.parametrize("stop", [-1, 10])
def test_a_stop_outside_the_sampling_is_refused(stop):
    with pytest.raises(ValueError, match=r"\[0, 10\)"):
        trajectories.rollout(
            VP, torch.zeros(1, 3), NULL, NULL, torch.tensor([stop]), VP.schedule.grid(10), guidance_scale=1.0
        )


def test_noised_samples_lie_on_the_schedule():
    x0, eps = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).unbind()
    x_t, t = trajectories.noised(VP.schedule, x0, eps, torch.tensor([0.1, 0.8], dtype=torch.float64))
    alpha, sigma = VP.schedule.at(t)[:2]
    torch.testing.assert_close(x_t, alpha[:, None].float() * x0 + sigma[:, None].float() * eps)
    assert t[0] < t[1] and t.tolist() == t.round().tolist()


@pytest.mark.parametrize("t", [None, 0.4])
def test_a_one_step_students_input(t):
    z = torch.randn(2, 3)
    x_t, times = trajectories.at_start(FLOW.schedule, z, t)
    expected = FLOW.schedule.t_max if t is None else t
    assert times.tolist() == [expected] * 2
    torch.testing.assert_close(x_t, FLOW.schedule.start_scale(expected) * z, rtol=0, atol=0)
