"""DDIM inversion: its one formula, and that a sampler finds its way back."""

import pytest
import torch

from sublimate.diffusion.inversion import ddim_inversion
from sublimate.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from sublimate.diffusion.samplers import ddim
from sublimate.diffusion.schedules import DiscreteVP, RectifiedFlow

TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
SCHEDULES = {"discrete": DiscreteVP(TABLE), "flow": RectifiedFlow()}
X0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]


def exact(schedule):
    weights, means = torch.tensor([0.4, 0.6]).double(), torch.tensor([[-1.0], [0.8]]).double()
    return MixtureDenoiser(GaussianMixture(weights, means, torch.tensor([0.5, 0.3]).double()), schedule)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
class TestInversion:
    @pytest.mark.slow
    def test_a_sampler_returns_to_the_data_and_the_more_steps_the_nearer(self, schedule):
        errors = []
        for steps in (25, 100):
            grid = schedule.grid(steps)
            path = ddim_inversion(exact(schedule), X0, schedule, grid)
            assert len(path) == steps + 1 and path[-1] is X0
            back = ddim(exact(schedule), path[0], schedule, grid)
            errors.append(float((back - X0).abs().max()))
        assert errors[1] < errors[0] / 2 and errors[1] < 0.15

    def test_each_step_is_the_formula(self, schedule):
        grid = schedule.grid(4)
        path = ddim_inversion(exact(schedule), X0, schedule, grid)
        s, t = float(grid[2]), float(grid[1])
        at_s, at_t = schedule.at(s), schedule.at(t)
        eps = exact(schedule)(path[2], torch.full((9,), s, dtype=torch.float64)).eps
        x0 = (path[2] - at_s.sigma * eps) / at_s.alpha
        torch.testing.assert_close(path[1], at_t.alpha * x0 + at_t.sigma * eps)
        # Data are clean: their noise is asked for at the cleanest time, and none is taken off.
        first = float(grid[3])
        eps = exact(schedule)(X0, torch.full((9,), schedule.t_min, dtype=torch.float64)).eps
        torch.testing.assert_close(path[3], schedule.at(first).alpha * X0 + schedule.at(first).sigma * eps)
