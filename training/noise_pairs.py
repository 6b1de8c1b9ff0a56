"""The pairs of noise levels that consistency training compares: iCT's growing grid and ECT's shrinking gap."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sublimate.diffusion.schedules import Schedule
from sublimate.training.config import Config


class Doubling(Config):
    """Pairs of neighbours on a grid whose number of steps doubles as training goes on (iCT, sections 3.4 and 3.5).

    Attributes:
        kind: names this choice.
        first_steps, last_steps: s_0 and s_1, steps of the grid at first and at most.
        total_steps: K, the training steps over which the doublings are spread; the trainer's max_train_steps.
    """

    kind: Literal["doubling"] = "doubling"
    first_steps: int = Field(default=10, ge=1)
    last_steps: int = Field(default=1280, ge=1)
    total_steps: int = Field(default=400_000, ge=1)

    @property
    def _every(self) -> int:
        ratio = max(self.last_steps // self.first_steps, 1)
        return max(math.floor(self.total_steps / (math.log2(ratio) + 1)), 1)

    def phases(self) -> tuple[int, ...]:
        """The first steps of each grid."""
        doublings = math.ceil(math.log2(max(self.last_steps / self.first_steps, 1)))
        return tuple(self._every * i for i in range(doublings + 1))

    def levels(self, step: int) -> int:
        """N(k) = min(s_0 2^floor(k/K'), s_1) + 1 with K' = floor(K / (log2 floor(s_1/s_0) + 1))."""
        return min(self.first_steps * 2 ** (step // self._every), self.last_steps) + 1


class Continuous(Config):
    """Any level t and a lower one r that draws nearer in stages (ECT, Geng et al. 2024, arXiv 2406.14548).

    Attributes:
        kind: names this choice.
        decay: q, by which a stage divides t - r.
        steps_per_stage: training steps of a stage.
        largest_ratio: where r/t stops, before the correction at low noise.
    """

    kind: Literal["continuous"] = "continuous"
    decay: float = Field(default=2.0, gt=1)
    steps_per_stage: int = Field(default=25_000, ge=1)
    largest_ratio: float = Field(default=0.999, gt=0, lt=1)

    def phases(self) -> tuple[int, ...]:
        """Stages never end: a run may stop in any."""
        return (0,)

    def lower(self, t: Tensor, step: int) -> Tensor:
        """r = max(t - t (1 - ratio) (1 + 8 sigmoid(-t)), 0) with ratio = 1 - 1/q^(stage + 1); shaped like t."""
        ratio = min(1 - self.decay ** -(step // self.steps_per_stage + 1), self.largest_ratio)
        return (t - t * (1 - ratio) * (1 + 8 * torch.sigmoid(-t))).clamp_min(0)


def noise_range(schedule: Schedule, low: float, high: float) -> tuple[float, float]:
    """The part of [low, high] that a schedule has, as levels sigma/alpha.

    Raises:
        ValueError: if there is none.
    """
    ends = noise_at(schedule, schedule.t_min), noise_at(schedule, schedule.t_max)
    found = max(low, ends[0]), min(high, ends[1])
    if not found[0] < found[1]:
        raise ValueError(f"noise_range ({low}, {high}) has nothing of this schedule's levels {ends}: widen it.")
    return found


def noise_at(schedule: Schedule, t: float) -> float:
    """sigma/alpha at t; infinite where alpha is 0."""
    return float((-0.5 * schedule.log_snr(t)).exp())


def level_weights(grid: Tensor, mean: float, std: float) -> Tensor:
    """The probability of each pair (grid[i], grid[i + 1]) (iCT, section 3.5).

    p_i is proportional to erf((ln grid[i + 1] - mean)/(sqrt(2) std)) - erf((ln grid[i] - mean)/(sqrt(2) std)).

    Args:
        grid: (N,) ascending positive noise levels.
        mean, std: of the normal distribution of ln sigma.

    Returns:
        float64 (N - 1,), with sum 1.
    """
    mass = torch.erf((grid.double().log() - mean) / (math.sqrt(2) * std)).diff()
    return mass / mass.sum()


def truncated_lognormal(u: Tensor, mean: float, std: float, low: float, high: float) -> Tensor:
    """Levels within [low, high] from u in [0, 1), by inverting the distribution function; float64, shaped like u."""
    ends = torch.tensor([low, high], dtype=torch.float64, device=u.device)
    first, last = torch.special.ndtr((ends.log() - mean) / std)
    return (mean + std * torch.special.ndtri(first + u.double() * (last - first))).exp().clamp(low, high)
