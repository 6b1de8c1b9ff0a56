"""What every noise schedule gives: x_t = alpha(t) x0 + sigma(t) eps, its derivatives and its times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """What x_t is made of at one time, or at one time per sample.

    Attributes:
        alpha: float64, shaped like t; the factor of x0.
        sigma: float64, shaped like t; the factor of eps.
        d_alpha: d alpha / dt, with respect to the schedule's own t.
        d_sigma: d sigma / dt.
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def as_double(t: Tensor | float, device: torch.device | None = None) -> Tensor:
    """A time as a float64 tensor of its own shape.

    Args:
        t: a number or a tensor.
        device: where to put it; a tensor stays where it is unless given. A number is written there by a kernel:
            copying it from the host would stall a GPU.
    """
    if isinstance(t, Tensor):
        return t.to(device=device, dtype=torch.float64)
    return torch.full((), float(t), dtype=torch.float64, device=device)


class Schedule(ABC):
    """A noise schedule; immutable, so that copies of a denoiser share it.

    Times are numbers, 0-d tensors or one per sample (batch,). They are not range-checked: reading a tensor's values
    would stall a GPU.

    Attributes:
        t_max: the noisiest time.
        t_min: the cleanest time a network is called at.
        t_clean: the time at which sigma is 0.
        noise_scale: x at t_max is noise_scale * N(0, I).
        spacings: the kinds of grid it has.
    """

    t_max: float
    t_min: float
    t_clean: float
    noise_scale: float = 1.0
    spacings: tuple[str, ...] = ("trailing",)

    @abstractmethod
    def at(self, t: Tensor | float) -> Coefficients:
        """alpha, sigma and their derivatives at t, in float64 on t's device."""

    @abstractmethod
    def t_at_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """The time whose log(alpha^2/sigma^2) is the one given; float64, shaped like the input."""

    @abstractmethod
    def _grid(self, steps: int, spacing: str) -> Tensor:
        """The times a network is called at, float64 (steps,), descending."""

    @abstractmethod
    def _time_at(self, u: Tensor) -> Tensor:
        """Maps u in [0, 1] to times in [t_min, t_max], increasing."""

    def log_snr(self, t: Tensor | float) -> Tensor:
        """log(alpha^2/sigma^2) at t; float64, shaped like t, +inf where sigma is 0 and -inf where alpha is."""
        c = self.at(t)
        return 2 * (c.alpha.log() - c.sigma.log())

    def network_time(self, t: Tensor | float) -> Tensor:
        """What a network is told instead of t; float64, shaped like t."""
        return as_double(t)

    def start_scale(self, t: float) -> float:
        """The standard deviation of the pure noise that a one-step student trained at t is given."""
        return self.noise_scale

    def callable_time(self, log_snr: float) -> float:
        """The time nearest to a log-SNR at which a network, and an exported student, can be started.

        Raises:
            ValueError: for a level outside [t_min, t_max].
        """
        t = float(self.t_at_log_snr(log_snr))
        if not self.t_min <= t <= self.t_max:
            ends = [round(float(self.log_snr(end)), 2) for end in (self.t_max, self.t_min)]
            raise ValueError(f"A log-SNR of {log_snr} lies outside this schedule, whose range is {ends}.")
        return t

    def uniform_time(self, u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """The times that training draws, by inverting their distribution function.

        Args:
            u: values in [0, 1], any shape; uniform draws give the distribution that the schedule is trained on.
            low, high: the part of the range to use, as fractions: 0 is t_min and 1 is t_max.

        Returns:
            float64 times, shaped like u, on its device.

        Raises:
            ValueError: if low and high are not fractions in order.
        """
        if not 0 <= low <= high <= 1:
            raise ValueError(f"The range of times needs 0 <= low <= high <= 1, but is ({low}, {high}).")
        return self._time_at(low + (high - low) * as_double(u))

    def grid(self, steps: int, spacing: str = "trailing") -> Tensor:
        """The times a sampler walks through.

        Args:
            steps: the number of network calls of a first-order sampler, at least 1.
            spacing: one of the schedule's `spacings`; "trailing" always starts at t_max.

        Returns:
            float64 (steps + 1,) on the CPU, descending; the last is t_clean.

        Raises:
            ValueError: for fewer than one step or an unknown spacing.
        """
        if steps < 1:
            raise ValueError(f"A sampler needs at least 1 step, but steps is {steps}.")
        if spacing not in self.spacings:
            raise ValueError(f"{type(self).__name__} has no spacing {spacing!r}; use one of {list(self.spacings)}.")
        return torch.cat([self._grid(steps, spacing), torch.tensor([self.t_clean], dtype=torch.float64)])

    def __deepcopy__(self, memo: dict[int, Any]) -> Schedule:
        return self
