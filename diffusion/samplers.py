"""Samplers: from noise to data along a grid of times, with a function that denoises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sublimate.diffusion.predictions import Prediction, per_sample, weighted_sum
from sublimate.diffusion.schedules import Schedule

Denoise = Callable[[Tensor, Tensor], Prediction]
"""(x_t (batch, ...), t (batch,) float64) -> Prediction, with condition and guidance already chosen."""

Noise = Callable[[Tensor], Tensor]
"""x -> N(0, I) of x's shape, dtype and device."""

Jump = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (batch, ...), t (batch,), s (batch,), both float64) -> x at s, no noisier than t."""

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
        alpha_to, sigma_to = _level(schedule, to)
        fresh = eta * posterior_deviation(schedule, t, to)
        x = denoise(x, _times(x, t)).combine(alpha_to, math.sqrt(max(sigma_to**2 - fresh**2, 0.0)))
        if fresh > 0 and noise is not None:
            x = x + fresh * noise(x)
    return x


def posterior_deviation(schedule: Schedule, t: float, to: float) -> float:
    """The standard deviation of x at `to` given x0 and x at t, later than `to` (Song et al. 2021, eq. 16 at eta = 1).

    Written for any alpha and sigma; it is the fresh noise of a step of ancestral sampling.
    """
    (alpha, sigma), (alpha_to, sigma_to) = _level(schedule, t), _level(schedule, to)
    return sigma_to / sigma * math.sqrt(max(sigma**2 - (alpha / alpha_to * sigma_to) ** 2, 0.0))


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
        x = heun_step(denoise, denoise, x, schedule, _times(x, t), to)
    return x


def heun_step(predict: Denoise, correct: Denoise, x: Tensor, schedule: Schedule, t: Tensor, to: float) -> Tensor:
    """One of `heun`'s steps, whose two predictions may differ.

    Args:
        predict: denoises at the step's start.
        correct: denoises at the end of the proposal; not called where that is clean.
        x: (batch, ...) at t.
        schedule: what the times mean.
        t: (batch,) float64, where each sample is.
        to: where all of them go.

    Returns:
        x at `to`, shaped like x.
    """
    c, (alpha_to, sigma_to) = schedule.at(t), _level(schedule, to)
    first = predict(x, t)
    proposal = first.combine(alpha_to, sigma_to)
    if sigma_to == 0:
        return proposal
    second = correct(proposal, _times(x, to))
    # Trapezoidal rule; x itself is alpha x0 + sigma eps of the first prediction.
    half = (alpha_to - c.alpha) / 2, (sigma_to - c.sigma) / 2
    return first.combine(c.alpha + half[0], c.sigma + half[1]) + second.combine(*half)


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
    """Multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1): jumps that end at clean data.

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
    calls = _floats(times, 1)
    targets = [schedule.t_clean] * len(calls)
    return jumps(lambda x, t, s: denoise(x, t).x0, z, schedule, calls, targets, noise)


def jumps(jump: Jump, z: Tensor, schedule: Schedule, times: Grid, targets: Sequence[float], noise: Noise) -> Tensor:
    """Sampling by jumps along trajectories, each followed by fresh noise (Kim et al. 2024, arXiv 2310.02279, alg. 3).

    After the jump from t to s, fresh noise brings x from s up to the time t' of the next call, as the forward process
    would: x_t' = (alpha_t'/alpha_s) x_s + sqrt(sigma_t'^2 - (alpha_t'/alpha_s)^2 sigma_s^2) n. A jump that ends at t'
    itself adds none.

    Args:
        jump: what takes x from t to s.
        z: (batch, ...) N(0, I).
        schedule: what the times mean.
        times: descending, all the times `jump` starts from; the first is where z starts.
        targets: where each jump ends: at or below the time of the next one, the last at t_clean.
        noise: fresh noise; called after a jump that ends below the next time only.

    Returns:
        x0, shaped like z.

    Raises:
        ValueError: for times and targets that do not fit together.
    """
    calls = _floats(times, 1)
    ends, limits = [float(s) for s in targets], [*calls[1:], schedule.t_clean]
    if len(ends) != len(calls) or any(s > limit for s, limit in zip(ends, limits, strict=False)):
        raise ValueError(
            f"Jumps from {calls} need one target each, at or below the next one's start and {limits[-1]:g} for the "
            f"last, but have {ends}."
        )
    x = schedule.start_scale(calls[0]) * z
    for t, s, to in zip(calls, ends, limits, strict=True):
        x = jump(x, _times(x, t), _times(x, s))
        if s < to:
            c, c_to = schedule.at(s), schedule.at(to)
            kept = c_to.alpha / c.alpha
            fresh = (c_to.sigma**2 - (kept * c.sigma) ** 2).clamp_min(0).sqrt()
            x = weighted_sum(kept, x, fresh, noise(x))
    return x


def dynamic_threshold(x0: Tensor, quantile: float = 0.995, limit: float = 1.0) -> Tensor:
    """Clips x0 sample by sample (Saharia et al. 2022, arXiv 2205.11487, section 2.3): clamp(x0, -s, s) / s.

    s is the quantile of |x0| over the sample's elements, but at least 1 and at most `limit`; with a limit of 1 this is
    plain clipping to [-1, 1].

    Args:
        x0: (batch, ...).
        quantile: in [0, 1].
        limit: the largest s, at least 1.

    Returns:
        shaped like x0, within [-1, 1].
    """
    s = x0.abs().float().flatten(1).quantile(quantile, dim=1).clamp(1.0, limit).to(x0.dtype)
    bound = per_sample(s, x0)
    return x0.clamp(-bound, bound) / bound


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
