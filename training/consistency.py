"""Pieces of consistency and trajectory distillation: neighbouring times of a grid, jumps, the teacher's steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.guidance import extrapolated, guided
from sublimate.diffusion.predictions import Prediction, per_sample
from sublimate.diffusion.schedules import Schedule
from sublimate.training.ema import Average
from sublimate.training.teacher import Teacher, frozen


def jump(
    network: Callable[[Tensor, Tensor, Condition], Prediction],
    schedule: Schedule,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    condition: Condition,
) -> Tensor:
    """x_s = alpha_s x0 + sigma_s eps with the network's x0 and eps at (x, t): a DDIM step from t to s.

    Mathematically a jump from t to t is the identity, and one to clean data is the network's x0. Samples that are
    clean already stay as they are: no network is called at sigma = 0, so it sees them at t_min and is not used.

    Args:
        network: (x, t, condition) -> Prediction.
        schedule: what the times mean.
        x: (batch, ...) at t.
        t, s: (batch,) float64, s no noisier than t.
        condition: of batch size 1 or batch.

    Returns:
        shaped like x.
    """
    c = schedule.at(s)
    moved = network(x, t.clamp_min(schedule.t_min), condition).combine(c.alpha, c.sigma)
    return torch.where(per_sample(t <= schedule.t_clean, x), x, moved)


class GuidedSolver:
    """DDIM steps of the frozen teacher's guided probability-flow ODE between neighbouring times of a grid.

    Args:
        model: the teacher; stays frozen.
        grid_steps: steps of the grid from t_max to clean data; latent consistency models skip k = 1000/grid_steps
            times of a table.
    """

    def __init__(self, model: Teacher, grid_steps: int) -> None:
        self.teacher = frozen(model)
        self.schedule, self.null = self.teacher.schedule, model.null_condition()
        self.grid = self.schedule.grid(grid_steps)

    def neighbours(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The times grid[index] and grid[index + 1], float64 (batch,), for index in [0, grid_steps)."""
        grid = self.grid_on(index.device)
        return grid[index], grid[index + 1]

    def grid_on(self, device: torch.device) -> Tensor:
        """The grid on a device, to which it moves once."""
        self.grid = self.grid.to(device)
        return self.grid

    @torch.no_grad()
    def step(
        self,
        x_t: Tensor,
        t: Tensor,
        to: Tensor,
        condition: Condition,
        scale: float | Tensor,
        null: Condition | None = None,
    ) -> Tensor:
        """x at `to` from x_t at t, guided by `scale`, a number or one per sample; 1 is none.

        Guidance leads away from `null`, the model's own unless given.
        """
        c = self.schedule.at(to)
        if null is None:
            return guided(self.teacher, x_t, t, condition, self.null, scale).combine(c.alpha, c.sigma)
        return extrapolated(self.teacher, x_t, t, condition, null, scale).combine(c.alpha, c.sigma)


def target_state(average: Average | None) -> dict[str, Tensor]:
    """What a checkpoint keeps of an averaged target network; nothing where the target is the student itself."""
    return {} if average is None else {f"target.{name}": value for name, value in average.values.items()}


def load_target(average: Average | None, state: Mapping[str, Tensor]) -> None:
    """Restores `target_state`.

    Raises:
        ValueError: when it is that of another student.
    """
    if state.keys() != target_state(average).keys():
        raise ValueError("The checkpoint's target does not fit this student: resume with the same options.")
    if average is not None:
        average.load({name.removeprefix("target."): value for name, value in state.items()})
