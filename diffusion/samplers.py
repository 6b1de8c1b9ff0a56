"""Samplers: from noise to data along a grid of times, with a function that denoises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sublimate.diffusion.predictions import Prediction, add_noise
from sublimate.diffusion.schedules import Schedule

Denoise = Callable[[Tensor, Tensor], Prediction]
"""(x_t (batch, ...), t (batch,) float64) -> Prediction, with condition and guidance already chosen."""

Noise = Callable[[Tensor], Tensor]
"""x -> N(0, I) of x's shape, dtype and device."""

Grid = Tensor | Sequence[float]
"""Descending times; samplers step from each to the next, `Schedule.grid` makes them."""


def ddim(
    denoise: Denoise, x: Tensor, schedule: Schedule, grid: Grid, *, eta: float = 0.0, noise: Noise | None = None
) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12), on any schedule.

    Args:
        denoise: the network.
        x: (batch, ...) at grid[0].
        schedule: what the times mean.
        grid: (steps + 1,) descending.
        eta: 0 is deterministic, 1 is ancestral sampling (DDPM).
        noise: fresh noise for each step; needed for eta > 0.

    Returns:
        x at grid[-1], shaped like x.

    Raises:
        ValueError: for a negative eta, or a positive one without noise.
    """
    if eta < 0 or (eta > 0 and noise is None):
        raise ValueError(f"eta={eta} needs to be 0 or positive, and with `noise` unless it is 0.")
    for t, to in _steps(grid):
        (alpha, sigma), (alpha_to, sigma_to) = _level(schedule, t), _level(schedule, to)
        # Eq. 16, the posterior's standard deviation, written for any alpha and sigma.
        fresh = eta * sigma_to / sigma * math.sqrt(max(sigma**2 - (alpha / alpha_to * sigma_to) ** 2, 0.0))
        x = denoise(x, _times(x, t)).combine(alpha_to, math.sqrt(max(sigma_to**2 - fresh**2, 0.0)))
        if fresh > 0 and noise is not None:
            x = x + fresh * noise(x)
    return x


def euler(denoise: Denoise, x: Tensor, schedule: Schedule, grid: Grid) -> Tensor:
    """Euler steps of the probability-flow ODE dx = x0 dalpha + eps dsigma.

    On EDM and rectified flows this is Euler in the schedule's own time (Karras et al. 2022, arXiv 2206.00364,
    algorithm 1 without its correction); on every schedule it agrees with `ddim` at eta = 0.

    Args:
        denoise: the network.
        x: (batch, ...) at grid[0].
        schedule: what the times mean.
        grid: (steps + 1,) descending.

    Returns:
        x at grid[-1], shaped like x.
    """
    for t, to in _steps(grid):
        x = denoise(x, _times(x, t)).combine(*_level(schedule, to))
    return x


def heun(denoise: Denoise, x: Tensor, schedule: Schedule, grid: Grid) -> Tensor:
    """Heun's second-order steps of dx = x0 dalpha + eps dsigma (Karras et al. 2022, algorithm 1, without churn).

    Integrating over alpha and sigma instead of time is the same on EDM and rectified flows, and needs no derivative
    of a table elsewhere.

    Args:
        denoise: the network, called twice a step and once in a last step that ends at sigma = 0.
        x: (batch, ...) at grid[0].
        schedule: what the times mean.
        grid: (steps + 1,) descending.

    Returns:
        x at grid[-1], shaped like x.
    """
    for t, to in _steps(grid):
        (alpha, sigma), (alpha_to, sigma_to) = _level(schedule, t), _level(schedule, to)
        first = denoise(x, _times(x, t))
        proposal = first.combine(alpha_to, sigma_to)
        if sigma_to == 0:
            x = proposal
            continue
        second = denoise(proposal, _times(x, to))
        # Trapezoidal rule; x itself is alpha x0 + sigma eps of the first prediction.
        half = (alpha_to - alpha) / 2, (sigma_to - sigma) / 2
        x = first.combine(alpha + half[0], sigma + half[1]) + second.combine(*half)
    return x


def one_step(denoise: Denoise, z: Tensor, schedule: Schedule, t: float | None = None) -> Tensor:
    """x0 from pure noise in one call.

    Args:
        denoise: the network.
        z: (batch, ...) N(0, I).
        schedule: scales z.
        t: the time the student was trained at; t_max unless given.

    Returns:
        x0, shaped like z.
    """
    t = schedule.t_max if t is None else t
    return denoise(schedule.start_scale(t) * z, _times(z, t)).x0


def consistency(denoise: Denoise, z: Tensor, schedule: Schedule, times: Grid, noise: Noise) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1).

    Args:
        denoise: the consistency function.
        z: (batch, ...) N(0, I).
        schedule: what the times mean.
        times: descending, all the times the network is called at; the first is where z starts, usually t_max. For a
            sampler's grid leave out its last, clean time.
        noise: fresh noise after each call but the last.

    Returns:
        x0, shaped like z.

    Raises:
        ValueError: without times.
    """
    start, *rest = _floats(times, 1)
    x0 = one_step(denoise, z, schedule, start)
    for t in rest:
        t_all = _times(z, t)
        x0 = denoise(add_noise(schedule, x0, noise(x0), t_all), t_all).x0
    return x0


def _floats(grid: Grid, least: int) -> list[float]:
    times = [float(t) for t in (grid.tolist() if isinstance(grid, Tensor) else grid)]
    if len(times) < least or any(t <= to for t, to in itertools.pairwise(times)):
        raise ValueError(f"A sampler needs at least {least} strictly descending times, but got {times}.")
    return times


def _steps(grid: Grid) -> list[tuple[float, float]]:
    times = _floats(grid, 2)
    return list(itertools.pairwise(times))


def _level(schedule: Schedule, t: float) -> tuple[float, float]:
    c = schedule.at(t)
    return float(c.alpha), float(c.sigma)


def _times(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float64, device=x.device)
