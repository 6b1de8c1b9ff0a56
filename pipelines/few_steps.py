"""How a student of a few steps is sampled: by our own samplers, and by the stock scheduler that does the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sublimate.diffusion.predictions import Prediction, weighted_sum
from sublimate.diffusion.samplers import Noise, dynamic_threshold, jumps
from sublimate.diffusion.schedules import DiscreteVP, Schedule

FewStepSampler = Literal["consistency", "target_driven", "trajectory"]
FEW_STEP_SAMPLERS: tuple[str, ...] = get_args(FewStepSampler)

DenoiseTowards = Callable[[Tensor, Tensor, Tensor], Prediction]
"""(x_t (batch, ...), t (batch,), s (batch,), float64) -> Prediction, for a jump from t to s."""


@dataclass(frozen=True)
class FewSteps:
    """The sampling that a few-step student was trained for.

    Attributes:
        sampler: "consistency" goes to x0 and adds fresh noise (Song et al. 2023, algorithm 1); "target_driven" jumps
            to (1 - eta) of the next time by the network's own x0 and eps, then adds noise up to it (Wang et al. 2024,
            arXiv 2409.01347); "trajectory" does the same with a network that is told its target time (Kim et al. 2024,
            arXiv 2310.02279, algorithm 3).
        steps: network calls.
        eta: how far below the next time a jump ends, 0 is deterministic; not used by "consistency". It is a fraction
            of the time for "target_driven", and gamma for "trajectory": the jump ends where sigma/alpha is
            sqrt(1 - gamma^2) of the next one.
        times: the descending schedule times of the calls; None for `steps` of `grid_steps`.
        grid_steps: the grid that the student was trained on, as a number of steps; `steps` times spread over it are
            called. None for the family's own grid of `steps`.
        guidance_scale: the guidance that goes with it: 1 is none, also where the student is told the scale.
        clipped_calls: how many of the first calls have their x0 clipped by dynamic thresholding.
        clip_limit: the largest value that is clipped to; 1 clips to [-1, 1].

    Raises:
        ValueError: for a number of steps, an eta or times that make no sampling.
    """

    sampler: FewStepSampler
    steps: int = 4
    eta: float = 0.0
    times: tuple[float, ...] | None = None
    grid_steps: int | None = None
    guidance_scale: float = 1.0
    clipped_calls: int = 0
    clip_limit: float = 1.0

    def __post_init__(self) -> None:
        if self.sampler not in FEW_STEP_SAMPLERS:
            raise ValueError(f"There is no few-step sampler {self.sampler!r}; use {', '.join(FEW_STEP_SAMPLERS)}.")
        if self.steps < 1:
            raise ValueError(f"Sampling needs at least 1 step, not {self.steps}.")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is a fraction from 0 to 1, not {self.eta}.")
        if self.times is not None and len(self.times) != self.steps:
            raise ValueError(f"{self.steps} steps need {self.steps} times, not {len(self.times)}.")
        if self.times is not None and any(s >= t for t, s in itertools.pairwise(self.times)):
            raise ValueError(f"The times of a sampler's calls descend, unlike {list(self.times)}.")
        if self.grid_steps is not None and self.grid_steps < self.steps:
            raise ValueError(f"A grid of {self.grid_steps} times has no {self.steps} steps.")
        if self.clipped_calls < 0 or self.clip_limit < 1:
            raise ValueError(
                f"Clipping needs 0 or more calls and a limit of at least 1, not {self.clipped_calls} and "
                f"{self.clip_limit}."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for `sublimate.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FewSteps:
        """What `to_dict` wrote.

        Raises:
            ValueError: for unknown entries, or values that make no sampling.
        """
        if unknown := sorted(values.keys() - {field.name for field in fields(cls)}):
            raise ValueError(f"few_steps has no entry {unknown[0]!r}: export the student again.")
        times = values.get("times")
        return cls(**{**values, "times": None if times is None else tuple(map(float, times))})

    def call_times(self, schedule: Schedule) -> tuple[float, ...]:
        """The times of the network calls, descending.

        Raises:
            ValueError: for times outside the schedule.
        """
        if self.times is not None:
            if not all(schedule.t_clean < t <= schedule.t_max for t in self.times):
                raise ValueError(
                    f"Times lie above {schedule.t_clean:g} and up to {schedule.t_max:g}, not {list(self.times)}."
                )
            return self.times
        grid = schedule.grid(self.grid_steps or self.steps).tolist()[:-1]
        # As LCMScheduler and TCDScheduler choose: the first is always called.
        return tuple(grid[i * len(grid) // self.steps] for i in range(self.steps))

    def targets(self, schedule: Schedule) -> tuple[float, ...]:
        """Where the jumps from `call_times` end; the last at clean data."""
        followed = self.call_times(schedule)[1:]
        return (*(self._target(schedule, t) for t in followed), schedule.t_clean)

    def _target(self, schedule: Schedule, t: float) -> float:
        """Where a jump ends whose next call is at t."""
        if self.sampler == "consistency" or self.eta == 1:
            return schedule.t_clean
        if self.eta == 0:
            return t
        if self.sampler == "trajectory":
            # Kim et al. 2024, algorithm 3, with the noise level sigma/alpha in EDM's time's place.
            return float(schedule.t_at_log_snr(schedule.log_snr(t) - math.log(1 - self.eta**2)))
        if not isinstance(schedule, DiscreteVP):
            return (1 - self.eta) * t
        # In the precision of diffusers' TCDScheduler, so that both round to the same entry of the table.
        whole = float(torch.floor((1 - self.eta) * torch.tensor(int(t))))
        return whole if whole >= 1 else schedule.t_clean


def sample_few_steps(
    few_steps: FewSteps, denoise: DenoiseTowards, z: Tensor, schedule: Schedule, noise: Noise
) -> Tensor:
    """Draws as `few_steps` says.

    Args:
        few_steps: how.
        denoise: the student, with condition and guidance already chosen.
        z: (batch, ...) N(0, I).
        schedule: what the times mean.
        noise: fresh noise.

    Returns:
        x0, shaped like z.
    """
    times = few_steps.call_times(schedule)
    pending = iter(range(len(times)))

    def jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        prediction, c = denoise(x, t, s), schedule.at(s)
        if next(pending) >= few_steps.clipped_calls:
            return prediction.combine(c.alpha, c.sigma)
        # The noise stays the network's own (Wang et al. 2024, inference).
        x0 = dynamic_threshold(prediction.x0, limit=few_steps.clip_limit)
        return weighted_sum(c.alpha, x0, c.sigma, prediction.eps)

    return jumps(jump, z, schedule, times, few_steps.targets(schedule), noise)
