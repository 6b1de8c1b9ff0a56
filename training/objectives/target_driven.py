"""Target-driven distillation: trajectories cut at the times that few-step samplers jump between (Wang et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from sublimate.diffusion.predictions import add_noise
from sublimate.diffusion.schedules import DiscreteVP, Schedule
from sublimate.pipelines.few_steps import FewSteps
from sublimate.training.consistency import GuidedSolver, jump
from sublimate.training.losses import pseudo_huber_loss
from sublimate.training.objective import Artefact, Batch, Loss, ObjectiveConfig, SoloObjective, Turn
from sublimate.training.players import PlayerConfig, make_player
from sublimate.training.teacher import Teacher, check_guidance, images_and


class TargetDrivenConfig(ObjectiveConfig):
    """Options of target-driven distillation; defaults are those published for SDXL.

    Attributes:
        guidance_scale: the teacher's guidance; 1 is none. The published 3.5 counts from 0.
        grid_steps: the teacher's steps from noise to data.
        target_steps: from the fewest to the most steps that the student shall be sampled in; its targets are the times
            of all those samplers.
        eta: how far a target may be lowered, as a fraction of its time; each is by a random part of that.
        empty_prompts: fraction of samples without text, so that the student can be guided when it is sampled.
        huber_c: c of sqrt(d^2 + c^2) - c, in units of x.
        sampling_steps, sampling_eta, sampling_guidance: the exported student's default sampling.
        sampling_times: its times, descending, if not spread evenly: (999, 875, 751, 499, 251) for 5 steps on a table.
        student: how the student is made and optimised.
    """

    guidance_scale: float = Field(default=4.5, ge=1)
    grid_steps: int = Field(default=250, ge=1)
    target_steps: tuple[int, int] = (4, 8)
    eta: float = Field(default=0.3, ge=0, le=1)
    empty_prompts: float = Field(default=0.2, ge=0, le=1)
    huber_c: float = Field(default=1e-3, gt=0)
    sampling_steps: int = Field(default=4, ge=1)
    sampling_eta: float = Field(default=0.2, ge=0, le=1)
    sampling_guidance: float = Field(default=1.7, ge=1)
    sampling_times: tuple[float, ...] | None = None
    student: PlayerConfig = PlayerConfig(kind="lora", rank=64, learning_rate=1e-6, adam_weight_decay=0.0)

    @field_validator("target_steps")
    @classmethod
    def _in_order(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= value[0] <= value[1]:
            raise ValueError(f"target_steps goes from at least 1 step to as many or more, not {value}.")
        return value

    def passes(self, step: int = 0) -> float:
        # The teacher's step, the student forward and backward, the target.
        return self.guided_passes(self.guidance_scale != 1) + 3 + 1


class TargetDriven(SoloObjective):
    """Minimises E[ d(x_tau of theta from x_t, x_tau of sg[theta] from x_s) ], tau a target at or below s.

    t and s are neighbours on the grid, x_s is one DDIM step of the guided teacher from x_t, and x_tau is a jump by the
    network's own x0 and eps. Jumps that agree from neighbours end where the teacher's trajectory goes. The network is
    not told tau, and one x0 serves several targets exactly only where trajectories are straight: so the targets are
    few, those of the jumps that few-step samplers make, instead of all (CTM) or clean data alone (CD).

    `eta` lowers targets as the sampler of that eta does. Without text a sample's teacher is the null condition alone,
    whatever the scale, because condition and null are then the same: the student learns guided conditional jumps and
    unguided empty ones, and sampling may guide it anew. The public code's null is a zero embedding instead, which is
    not SDXL's embedding of an empty prompt, so that its samples without text are guided away from zeros.

    Args:
        model: the teacher; stays frozen.
        config: options.
    """

    Config = TargetDrivenConfig
    paper: ClassVar[str] = "2409.01347"

    def __init__(self, model: Teacher, config: TargetDrivenConfig) -> None:
        super().__init__(model, config, "student", make_player(model.denoiser, config.student, ema=True))
        self.solver = GuidedSolver(model, config.grid_steps)
        self.schedule, self.shape = self.solver.schedule, tuple(model.latent_shape)
        check_guidance(self.solver.null, config.guidance_scale)
        self.targets = merged_targets(config.grid_steps, config.target_steps)
        self.window = target_window(config.grid_steps, config.target_steps[0])
        times, told = config.sampling_times, model.denoiser.reads_guidance
        self.few_steps = FewSteps(
            "target_driven",
            steps=config.sampling_steps if times is None else len(times),
            eta=config.sampling_eta,
            times=times,
            grid_steps=config.grid_steps,
            # What is told a guidance was told none by the loss, and is told none when it is sampled.
            guidance_scale=1.0 if told or not self.solver.null else config.sampling_guidance,
        )

    @property
    def needs(self) -> frozenset[str]:
        return images_and(self.solver.null)

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        device = batch["images"].device
        index = batch.random.integers(self.config.grid_steps, device)
        t, s = self.solver.neighbours(index)
        eps, choice = batch.random.normal(self.shape, device), batch.random.uniform(device)
        targets = self.targets.to(device)
        target = self.solver.grid_on(device)[targets[choose_targets(targets, index + 1, self.window, choice)]]
        target = lowered(self.schedule, target, self.config.eta * batch.random.uniform(device))
        empty = batch.random.uniform(device) < self.config.empty_prompts
        return batch.adding(t=t, s=s, target=target, eps=eps, empty=empty)

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        t, s, target, student = batch["t"], batch["s"], batch["target"], self.player.module
        condition = batch.condition
        if self.solver.null:
            condition = condition.dropping(batch["empty"], self.solver.null)
        x_t = add_noise(self.schedule, batch["images"], batch["eps"], t)
        with torch.no_grad():
            x_s = self.solver.step(x_t, t, s, condition, self.config.guidance_scale)
            wanted = jump(student, self.schedule, x_s, s, target, condition)
        reached = jump(student, self.schedule, x_t, t, target, condition)
        return Loss(pseudo_huber_loss(reached, wanted, self.config.huber_c).mean())

    def exports(self) -> Artefact:
        return Artefact(self.config.student.artefact, self.player.module, few_steps=self.few_steps)


def merged_targets(grid_steps: int, target_steps: Sequence[int]) -> Tensor:
    """The times at which some sampler's jump ends, as positions on the grid: 0 is its noisiest time, grid_steps clean.

    A sampler of K steps calls the positions floor(i grid_steps / K). The first is nobody's target, and clean data is
    everybody's last.

    Args:
        grid_steps: steps of the grid.
        target_steps: the fewest and the most steps K.

    Returns:
        int64 (targets,), ascending, towards clean data.
    """
    fewest, most = target_steps
    called = {i * grid_steps // k for k in range(fewest, most + 1) for i in range(1, k)}
    return torch.tensor(sorted(called - {0} | {grid_steps}))


def target_window(grid_steps: int, fewest: int) -> float:
    """How far beyond the nearest target one may lie, in positions: the longest jump, and 1 % against rounding.

    For 250 positions of 4 times and at least 4 steps this is 65 positions, the 260 of the public code.
    """
    return grid_steps / fewest + max(1.0, grid_steps / 100)


def choose_targets(targets: Tensor, position: Tensor, window: float, choice: Tensor) -> Tensor:
    """One of the targets ahead of each sample, uniformly among those within the window of the nearest.

    Args:
        targets: (targets,) ascending positions.
        position: (batch,) where the jump starts at the latest; a target there is one.
        window: in positions.
        choice: (batch,) uniform in [0, 1).

    Returns:
        int64 (batch,), indices into `targets`.
    """
    first = torch.searchsorted(targets, position)
    beyond = torch.searchsorted(targets.double(), targets[first] + window, right=True)
    return first + (choice * (beyond - first)).long()


def lowered(schedule: Schedule, t: Tensor, share: Tensor) -> Tensor:
    """(1 - share) t, whole on a table as `FewSteps` has it; clean times stay clean. All (batch,) float64."""
    moved = (1 - share) * t
    if isinstance(schedule, DiscreteVP):
        moved = moved.floor()
        return torch.where(moved >= 1, moved, torch.full_like(t, schedule.t_clean))
    return torch.where(t > schedule.t_clean, moved, t)
