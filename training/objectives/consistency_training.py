"""Consistency training: one-step models from data, not from a teacher's trajectories (Song & Dhariwal 2023, ECT)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.predictions import add_noise
from sublimate.diffusion.schedules import EDM
from sublimate.pipelines.few_steps import FewSteps
from sublimate.training.consistency import jump
from sublimate.training.losses import pseudo_huber_norm
from sublimate.training.noise_pairs import (
    Continuous,
    Doubling,
    level_weights,
    noise_at,
    noise_range,
    truncated_lognormal,
)
from sublimate.training.objective import Artefact, Batch, Loss, ObjectiveConfig, SoloObjective, Turn
from sublimate.training.players import PlayerConfig, make_player
from sublimate.training.teacher import Trainee


class ConsistencyTrainingConfig(ObjectiveConfig):
    """Options of consistency training; defaults are iCT's for CIFAR-10, with AdamW in RAdam's place.

    ECT is initialize "teacher", pairs.kind "continuous", huber 1e-8 (the plain norm), dropout 0.2.

    Attributes:
        initialize: "random" starts from fresh weights of the model's architecture, "teacher" from the model's own.
        pairs: which two noise levels are compared.
        noise_range: the lowest and highest noise level sigma/alpha, cut to what the model's schedule has.
        noise_mean, noise_std: of ln(sigma/alpha), which is drawn normally; for data of standard deviation 0.5.
        huber: c / sqrt(d) of sqrt(|x|^2 + c^2) - c, d the number of elements of a sample; in units of x0.
        dropout: of the student's dropout layers.
        sampling_steps: network calls of the exported student's default sampling.
        sampling_noise: the noise levels of those calls after the first, descending, in units of x0; the papers search
            for them (0.821 for two steps on CIFAR-10). Empty takes the schedule's own grid.
        student: how the student is made and optimised.
    """

    initialize: Literal["random", "teacher"] = "random"
    pairs: Doubling | Continuous = Field(default=Doubling(), discriminator="kind")
    noise_range: tuple[float, float] = (0.002, 80.0)
    noise_mean: float = -1.1
    noise_std: float = Field(default=2.0, gt=0)
    huber: float = Field(default=0.00054, gt=0)
    dropout: float = Field(default=0.3, ge=0, lt=1)
    sampling_steps: int = Field(default=1, ge=1)
    sampling_noise: tuple[float, ...] = ()
    student: PlayerConfig = PlayerConfig(learning_rate=1e-4, adam_weight_decay=0.0)

    @field_validator("noise_range")
    @classmethod
    def _in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] < value[1]:
            raise ValueError(f"noise_range goes from a positive level to a higher one, not {value}.")
        return value

    @model_validator(mode="after")
    def _one_level_for_each_call(self) -> Self:
        levels = (*self.sampling_noise, self.noise_range[0])
        if self.sampling_noise and len(levels) != self.sampling_steps:
            raise ValueError(
                f"sampling_noise is of the calls after the first: {self.sampling_steps} steps have "
                f"{self.sampling_steps - 1}, not {len(self.sampling_noise)}."
            )
        if not all(high > low for high, low in itertools.pairwise(levels)):
            raise ValueError(f"sampling_noise descends and stays above noise_range, unlike {self.sampling_noise}.")
        return self

    def phases(self) -> tuple[int, ...]:
        return self.pairs.phases()

    def passes(self, step: int = 0) -> float:
        # The student forward and backward, and its own target.
        return 3 + 1


class ConsistencyTraining(SoloObjective):
    """Minimises E[ d(f_theta(x_t, t), sg f_theta(x_r, r)) / (t - r) ], x_t and x_r of the same x0 and the same eps.

    t and r < t are noise levels sigma/alpha, so that every schedule serves: x = x_t/alpha_t = x0 + t eps. f is the
    network's x0, and x itself at r = 0, the boundary that keeps f from collapsing; iCT builds f(x, sigma_min) = x into
    its preconditioning, which a checkpoint's own x0 does not have, so the lowest level of a grid is replaced by 0.

    For squared d the target's mean given x_t is E f(x_t - (t - r) eps), whose noise is E[eps | x_t] to first order:
    an Euler step of the data's probability-flow ODE, without a teacher. f is exact as t - r -> 0 only; for data
    N(m, s^2) the limit is m + (x - m) s/sqrt(s^2 + t^2). iCT's d = sqrt(|x|^2 + c^2) - c is squared only where
    |f(x_t) - f(x_r)| is far below c; above, f is drawn from the mean towards the median of f(x_r) given x_t.

    Both evaluations draw the same dropout masks. The trainer seeds those by micro-batch, so with dropout accumulation
    changes them. There is no guidance to distil: f follows the data, whose captions are its condition.

    Args:
        model: the architecture, schedule and, for initialize "teacher", the weights to start from; stays as it is.
        config: options.
    """

    Config = ConsistencyTrainingConfig
    paper: ClassVar[str] = "2310.14189"

    def __init__(self, model: Trainee, config: ConsistencyTrainingConfig) -> None:
        start = model.denoiser
        if config.initialize == "random":
            if config.student.kind != "full":
                raise ValueError("Random weights cannot carry a LoRA: set objective.student.kind to full.")
            start = with_fresh_weights(start)
        super().__init__(model, config, "student", make_player(start, config.student, ema=True))
        set_dropout(self.student, config.dropout)
        self.schedule, self.shape = model.denoiser.schedule, tuple(model.latent_shape)
        self.unconditional = not model.null_condition()
        self.low, self.high = noise_range(self.schedule, *config.noise_range)
        whole = self.high >= noise_at(self.schedule, self.schedule.t_max)
        self.start = self.schedule.t_max if whole else self.schedule.callable_time(-2 * math.log(self.high))
        self.few = self._sampling()

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"images"} if self.unconditional else {"images", "prompts"})

    @property
    def student(self) -> nn.Module:
        return self.player.module

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        config, device = self.config, batch["images"].device
        u, eps = batch.random.uniform(device), batch.random.normal(self.shape, device)
        if isinstance(config.pairs, Doubling):
            grid = EDM(self.low, self.high).grid(config.pairs.levels(step))[:-1].flip(0).to(device)
            ends = level_weights(grid, config.noise_mean, config.noise_std).cumsum(0)
            index = torch.searchsorted(ends, u, right=True).clamp(max=len(ends) - 1)
            r, t = torch.where(index > 0, grid[index], 0.0), grid[index + 1]
        else:
            t = truncated_lognormal(u, config.noise_mean, config.noise_std, self.low, self.high)
            r = config.pairs.lower(t, step)
            r = torch.where(r >= self.low, r, 0.0)
        return batch.adding(t=self._time(t), r=self._time(r), weight=1 / (t - r), eps=eps)

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        with same_randomness(batch["eps"].device), torch.no_grad():
            target = self.to_data(batch, batch["r"])
        x0 = self.to_data(batch, batch["t"])
        distance = pseudo_huber_norm(x0, target, self.config.huber * math.sqrt(math.prod(self.shape)))
        return Loss((batch["weight"].float() * distance).mean(), {"student/distance": distance.mean()})

    def to_data(self, batch: Batch, t: Tensor) -> Tensor:
        """f at the schedule's time t of the batch's images and noise."""
        x_t = add_noise(self.schedule, batch["images"], batch["eps"], t)
        clean = torch.full_like(t, self.schedule.t_clean)
        return jump(self.student, self.schedule, x_t, t, clean, batch.condition)

    def _time(self, noise: Tensor) -> Tensor:
        """The schedule's time of a noise level sigma/alpha."""
        schedule = self.schedule
        t = schedule.t_at_log_snr(-2 * noise.clamp_min(self.low).log()).clamp(schedule.t_min, schedule.t_max)
        return torch.where(noise > 0, t, schedule.t_clean)

    def _below(self, count: int) -> list[float]:
        """The sampler's times after the first: the configured ones, or of the coarsest grid with so many below it."""
        if levels := self.config.sampling_noise:
            if levels[-1] < self.low:
                raise ValueError(
                    f"sampling_noise ends at {levels[-1]:g}, below the schedule's {self.low:g}: raise it."
                )
            times = [self.schedule.callable_time(-2 * math.log(level)) for level in levels]
            if times[0] < self.start:
                return times
            raise ValueError(f"sampling_noise starts at {levels[0]:g}, above the schedule's first call: lower it.")
        for steps in range(count + 1, 1000):
            times = [t for t in self.schedule.grid(steps).tolist()[1:-1] if t < self.start]
            if len(times) >= count:
                return times[:count]
        raise ValueError(
            f"noise_range ends at {self.high:g}, below which no grid has {count} times: sample in fewer steps, or "
            "train on more noise."
        )

    def _sampling(self) -> FewSteps | None:
        """The exported student's own sampling; None is one step from `start`."""
        if (steps := self.config.sampling_steps) == 1:
            return None
        own_grid = self.start == self.schedule.t_max and not self.config.sampling_noise
        times = None if own_grid else (self.start, *self._below(steps - 1))
        return FewSteps("consistency", steps=steps, times=times)

    def exports(self) -> Artefact:
        return Artefact(self.config.student.artefact, self.student, self.start, self.few)


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """What follows draws from the global generators what was drawn within: two calls have the same dropout masks."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        yield


def set_dropout(module: nn.Module, rate: float) -> None:
    """Sets every dropout layer's rate.

    Raises:
        ValueError: for a positive rate where there is no such layer.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Dropout)]
    if rate > 0 and not layers:
        raise ValueError("The network has no dropout layers: set objective.dropout to 0.")
    for layer in layers:
        layer.p = rate


def with_fresh_weights(denoiser: Denoiser) -> Denoiser:
    """A denoiser of the same architecture with newly drawn weights; the given one stays as it is.

    A diffusers network is built anew from its configuration, any other by its layers' own `reset_parameters`.

    Raises:
        ValueError: when some weights belong to a layer that cannot draw them.
    """
    old = denoiser.network
    reference = next(old.parameters())
    if hasattr(old, "from_config"):
        network = type(old).from_config(old.config)  # type: ignore[attr-defined]
    else:
        network = copy.deepcopy(old)
        for name, layer in network.named_modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
            elif any(True for _ in layer.parameters(recurse=False)):
                raise ValueError(
                    f"{type(layer).__name__} {name!r} cannot draw fresh weights: initialize from teacher."
                )
    network = network.to(reference.device)
    # diffusers warns about every conversion, so only what needs one is converted.
    if any(p.dtype != reference.dtype for p in network.parameters()):
        network = network.to(reference.dtype)
    return Denoiser(network, denoiser.call, denoiser.schedule, denoiser.parametrization)
