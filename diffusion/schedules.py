"""The noise schedules: discrete variance preserving, EDM, rectified flow, TrigFlow, and which one a scheduler has."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sublimate.diffusion.betas import alphas_cumprod_from_config
from sublimate.diffusion.noise import Coefficients, Schedule, as_double

__all__ = ["EDM", "Coefficients", "DiscreteVP", "RectifiedFlow", "Schedule", "TrigFlow", "from_scheduler"]

# Schedulers that train the same forward process: a table of alphas_cumprod made from betas.
_DISCRETE_SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDIM",
        "DDIMParallel",
        "DDPM",
        "DDPMParallel",
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverSDE",
        "DPMSolverSinglestep",
        "EulerAncestralDiscrete",
        "EulerDiscrete",
        "HeunDiscrete",
        "KDPM2AncestralDiscrete",
        "KDPM2Discrete",
        "LCM",
        "LMSDiscrete",
        "PNDM",
        "TCD",
        "UniPCMultistep",
    )
)


def _entries(table: Tensor, index: Tensor) -> Tensor:
    """table[index]; indexing by a tensor without dimensions would read it back from the device."""
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)


class DiscreteVP(Schedule):
    """Variance preserving noise given by a table: t = 0 ... N-1, and t = -1 is clean.

    Between the table's times log alphas_cumprod is linear (Ho et al. 2020, eq. 4; alphas_cumprod(-1) = 1). If the last
    entry is 0 (zero terminal SNR), alpha is linear over the last interval instead. At a table's time the derivatives
    are those of the interval above it. d_sigma is infinite at t = -1. If the first entry is 1, t = 0 is clean itself
    and t_min is 1.

    Args:
        alphas_cumprod: (N,) strictly decreasing, within (0, 1); the first entry may be 1 and the last 0.

    Raises:
        ValueError: for a table that is not such.
    """

    t_min, t_clean = 0.0, -1.0
    spacings: tuple[str, ...] = ("trailing", "leading", "linspace")

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = alphas_cumprod.detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"alphas_cumprod needs shape (N,) with N > 1, but has {tuple(table.shape)}.")
        levels = torch.cat([torch.ones(1, dtype=torch.float64), table])
        if float(table[0]) == 1:
            self.t_clean, self.t_min, self.spacings = 0.0, 1.0, ("trailing",)
        if bool((levels.diff()[int(self.t_min) :] >= 0).any()) or float(levels[-1]) < 0 or float(table[0]) > 1:
            raise ValueError("alphas_cumprod must fall strictly from 1 or below to 0 or above.")
        self.alphas_cumprod = table
        self.t_max = len(table) - 1.0
        self.zero_terminal = float(table[-1]) == 0
        self._logs = {torch.device("cpu"): levels.log()}

    def _log_levels(self, device: torch.device) -> Tensor:
        """log alphas_cumprod from t = -1 on, (N + 1,), copied to a device once."""
        if device not in self._logs:
            self._logs[device] = self._logs[torch.device("cpu")].to(device)
        return self._logs[device]

    def at(self, t: Tensor | float) -> Coefficients:
        position = as_double(t) + 1
        levels = self._log_levels(position.device)
        left = position.detach().floor().clamp(0, len(levels) - 2).long()
        weight = position - left
        start = _entries(levels, left)
        slope = _entries(levels, left + 1) - start
        if self.zero_terminal:
            last = left == len(levels) - 2
            slope = torch.where(last, 0.0, slope)
        log_level = start + weight * slope
        alpha = (0.5 * log_level).exp()
        d_alpha = 0.5 * slope * alpha
        sigma = (-log_level.expm1()).sqrt()
        if self.zero_terminal:
            edge = (0.5 * start).exp()
            alpha = torch.where(last, edge * (1 - weight), alpha)
            d_alpha = torch.where(last, -edge, d_alpha)
            sigma = torch.where(last, (1 - alpha * alpha).sqrt(), sigma)
        # alpha^2 + sigma^2 = 1, differentiated.
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def t_at_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """As in `Schedule`; levels beyond t_max give t_max."""
        log_level = torch.nn.functional.logsigmoid(as_double(log_snr))
        levels = self._log_levels(log_level.device)
        left = torch.searchsorted(-levels, -log_level.detach(), right=True).sub(1).clamp(0, len(levels) - 2)
        start = _entries(levels, left)
        weight = (log_level - start) / (_entries(levels, left + 1) - start)
        if self.zero_terminal:
            linear_alpha = 1 - (0.5 * (log_level - start)).exp()
            weight = torch.where(left == len(levels) - 2, linear_alpha, weight)
        return left - 1 + weight.clamp(max=1.0)

    def callable_time(self, log_snr: float) -> float:
        """As in `Schedule`: the nearest whole time, because stock schedulers know no other."""
        return float(round(super().callable_time(log_snr)))

    def _time_at(self, u: Tensor) -> Tensor:
        # Every whole time is equally likely, t_min and t_max too.
        return (self.t_min + u * (self.t_max + 1 - self.t_min)).floor().clamp(max=self.t_max)

    def _grid(self, steps: int, spacing: str) -> Tensor:
        """The timesteps of diffusers' schedulers (Lin et al. 2024, arXiv 2305.08891, table 2)."""
        n = len(self.alphas_cumprod)
        # Rounding would let the last of almost n steps start at a t = 0 that is clean.
        most = n if self.t_clean < 0 else n // 2
        if steps > most:
            raise ValueError(f"A table of {n} times has no grid of {steps} steps; use at most {most}.")
        if steps == 1 and spacing != "trailing":
            raise ValueError(f"One step of spacing {spacing!r} would start at t=0, without noise; use 'trailing'.")
        i = torch.arange(steps, dtype=torch.float64)
        if spacing == "trailing":
            return (n - i * (n / steps)).round() - 1
        if spacing == "leading":
            return (i * (n // steps)).flip(0)
        return torch.linspace(0, n - 1, steps, dtype=torch.float64).round().flip(0)


class EDM(Schedule):
    """Noise added to unscaled data: t = sigma, alpha = 1 (Karras et al. 2022, arXiv 2206.00364).

    Args:
        sigma_min, sigma_max: the range of noise levels, in units of the data.
        rho: how much the grid and the times of training favour low noise (eq. 5).
        time_factor: the network is told time_factor * ln(sigma); 0.25 is the paper's c_noise (table 1).

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and rho > 0.
    """

    t_clean = 0.0

    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, time_factor: float = 0.25
    ) -> None:
        if not 0 < sigma_min < sigma_max or rho <= 0:
            raise ValueError(f"EDM needs 0 < sigma_min < sigma_max and rho > 0: {sigma_min}, {sigma_max}, {rho}.")
        self.t_min, self.t_max, self.rho, self.time_factor = float(sigma_min), float(sigma_max), rho, time_factor
        self.noise_scale = self.t_max

    def at(self, t: Tensor | float) -> Coefficients:
        t = as_double(t)
        one = torch.ones_like(t)
        return Coefficients(one, t, torch.zeros_like(t), one)

    def t_at_log_snr(self, log_snr: Tensor | float) -> Tensor:
        return (-0.5 * as_double(log_snr)).exp()

    def network_time(self, t: Tensor | float) -> Tensor:
        return self.time_factor * as_double(t).log()

    def start_scale(self, t: float) -> float:
        return float(t)

    def _time_at(self, u: Tensor) -> Tensor:
        low, high = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        return (low + u * (high - low)) ** self.rho

    def _grid(self, steps: int, spacing: str) -> Tensor:
        # Karras et al. 2022, eq. 5.
        return self._time_at(torch.linspace(1, 0, steps, dtype=torch.float64))


class RectifiedFlow(Schedule):
    """Straight lines from data to noise: x_t = (1 - t) x0 + t eps, t in [0, 1] (Liu et al. 2023, arXiv 2209.03003).

    Args:
        shift: > 0; moves the grid and the times of training towards noise (Esser et al. 2024, arXiv 2403.03206,
            eq. 23), not alpha and sigma.
        time_factor: the network is told time_factor * t; also the number of times it was trained at.
        dynamic: the shift depends on the resolution, which is known only when a grid is made.

    Raises:
        ValueError: for a shift that is not positive.
    """

    t_max, t_clean = 1.0, 0.0
    spacings = ("trailing", "linspace")

    def __init__(self, shift: float = 1.0, time_factor: float = 1000.0, *, dynamic: bool = False) -> None:
        if shift <= 0:
            raise ValueError(f"The shift of a rectified flow must be positive, but is {shift}.")
        self.shift, self.time_factor, self.dynamic = float(shift), float(time_factor), dynamic
        self.t_min = float(self._warp(torch.tensor(1 / self.time_factor, dtype=torch.float64)))

    def _warp(self, t: Tensor) -> Tensor:
        # Esser et al. 2024, eq. 23.
        return self.shift * t / (1 + (self.shift - 1) * t)

    def at(self, t: Tensor | float) -> Coefficients:
        t = as_double(t)
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one)

    def t_at_log_snr(self, log_snr: Tensor | float) -> Tensor:
        return torch.sigmoid(-0.5 * as_double(log_snr))

    def network_time(self, t: Tensor | float) -> Tensor:
        return self.time_factor * as_double(t)

    def _time_at(self, u: Tensor) -> Tensor:
        cleanest = 1 / self.time_factor
        return self._warp(cleanest + u * (1 - cleanest))

    def _grid(self, steps: int, spacing: str) -> Tensor:
        # "trailing" is what FLUX's pipeline asks for; "linspace" is FlowMatchEulerDiscreteScheduler's own default,
        # whose last time has been shifted once before all are, if the shift was known by then.
        cleanest = 1 / self.time_factor if self.dynamic else self.t_min
        last = 1 / steps if spacing == "trailing" else cleanest
        return self._warp(torch.linspace(1, last, steps, dtype=torch.float64))


class TrigFlow(Schedule):
    """A quarter of a circle: x_t = cos(t) x0 + sigma_data sin(t) eps (Lu & Song 2025, arXiv 2410.11081, eq. 4).

    Args:
        sigma_data: standard deviation of the data.
        sigma_min: the noise level, relative to the signal, of the cleanest time a network is called at.

    Raises:
        ValueError: for a sigma_data or sigma_min that is not positive.
    """

    t_max, t_clean = math.pi / 2, 0.0

    def __init__(self, sigma_data: float = 0.5, sigma_min: float = 0.002) -> None:
        if sigma_data <= 0 or sigma_min <= 0:
            raise ValueError(f"TrigFlow needs positive sigma_data and sigma_min, but got {sigma_data}, {sigma_min}.")
        self.sigma_data = self.noise_scale = float(sigma_data)
        self.t_min = math.atan(sigma_min / sigma_data)

    def at(self, t: Tensor | float) -> Coefficients:
        t = as_double(t)
        cos, sin = t.cos(), t.sin()
        return Coefficients(cos, self.sigma_data * sin, -sin, self.sigma_data * cos)

    def t_at_log_snr(self, log_snr: Tensor | float) -> Tensor:
        return torch.atan((-0.5 * as_double(log_snr)).exp() / self.sigma_data)

    def _time_at(self, u: Tensor) -> Tensor:
        return self.t_min + u * (self.t_max - self.t_min)

    def _grid(self, steps: int, spacing: str) -> Tensor:
        return torch.linspace(self.t_max, self.t_max / steps, steps, dtype=torch.float64)


def from_scheduler(scheduler: Any, latent_shape: tuple[int, int, int] | None = None) -> Schedule:
    """The schedule that a diffusers scheduler's networks are trained with.

    Read are the noise levels and what the network is told, not how that scheduler walks through them (its order, its
    `timestep_spacing`, `use_karras_sigmas`, ...): that is the choice of our samplers and grids.

    Args:
        scheduler: any object with `config`, a mapping, whose class is named like diffusers'.
        latent_shape: (channels, height, width); needed only where the shift depends on the resolution (FLUX).

    Raises:
        ValueError: for a class or an option that has no schedule here, or a missing latent_shape.
    """
    name, config = type(scheduler).__name__, dict(scheduler.config)
    if name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        return EDM(config["sigma_min"], config["sigma_max"], config["rho"])
    if name == "CMStochasticIterativeScheduler":
        # Consistency models are told 1000 times c_noise.
        return EDM(config["sigma_min"], config["sigma_max"], config["rho"], time_factor=250.0)
    if name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"):
        shift, dynamic = _flow_shift(config, latent_shape), bool(config.get("use_dynamic_shifting"))
        return RectifiedFlow(shift, config.get("num_train_timesteps", 1000), dynamic=dynamic)
    if name not in _DISCRETE_SCHEDULERS:
        raise ValueError(f"There is no schedule for {name}; convert the pipeline to DDIM, flow match or EDM Euler.")
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"{name} with timestep_type={config['timestep_type']!r} has no schedule here.")
    if config.get("use_flow_sigmas"):
        return RectifiedFlow(config.get("flow_shift", 1.0), config.get("num_train_timesteps", 1000))
    return DiscreteVP(alphas_cumprod_from_config(config))


def _flow_shift(config: dict[str, Any], latent_shape: tuple[int, int, int] | None) -> float:
    """The shift of a flow-matching scheduler, by the latent's number of 2x2 patches where that decides."""
    for option in ("invert_sigmas", "shift_terminal"):
        if config.get(option):
            raise ValueError(f"A flow-match scheduler with {option}={config[option]} has no schedule here.")
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    if latent_shape is None:
        raise ValueError("This scheduler's shift depends on the resolution (use_dynamic_shifting): pass latent_shape.")
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    length = (latent_shape[-2] // 2) * (latent_shape[-1] // 2)
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    mu = config["base_shift"] + slope * (length - low)
    return mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)
