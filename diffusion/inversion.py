"""DDIM inversion: the noise, and the way to it, from which a deterministic sampler returns to given data."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sublimate.diffusion.predictions import weighted_sum
from sublimate.diffusion.samplers import Denoise, Grid
from sublimate.diffusion.schedules import Schedule


def ddim_inversion(denoise: Denoise, x0: Tensor, schedule: Schedule, grid: Grid) -> list[Tensor]:
    """Walks a sampler's grid backwards, from data to noise (Dhariwal & Nichol 2021, arXiv 2105.05233, appendix F).

        x_t = (alpha_t / alpha_s) (x_s - sigma_s eps) + sigma_t eps,   eps = eps(x_s, s),   s the time before t

    which is exact in the limit of many steps: a DDIM step from t to s would have asked for eps at x_t. Data are shown
    to the network as if at the schedule's cleanest time.

    Args:
        denoise: the network.
        x0: (batch, ...), at grid[-1].
        schedule: what the times mean.
        grid: (steps + 1,) descending, as `Schedule.grid` makes them.

    Returns:
        x at every time of the grid, in the grid's order; the last is x0 itself.
    """
    times = [float(t) for t in grid]
    path = [x0]
    for s, t in itertools.pairwise(reversed(times)):
        x, at_s, at_t = path[-1], schedule.at(s), schedule.at(t)
        called = torch.full((len(x),), max(s, schedule.t_min), dtype=torch.float64, device=x.device)
        kept = at_t.alpha / at_s.alpha
        path.append(weighted_sum(kept, x, at_t.sigma - kept * at_s.sigma, denoise(x, called).eps))
    return path[::-1]
