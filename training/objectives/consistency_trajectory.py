"""Consistency trajectories: a student told where to jump, from any noise level to any lower one (CTM, DITTO-2)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sublimate.diffusion.predictions import add_noise, per_sample
from sublimate.pipelines.few_steps import FewSteps
from sublimate.training.consistency import GuidedSolver, jump, load_target, target_state
from sublimate.training.ema import Average
from sublimate.training.losses import denoising_loss, pseudo_huber_loss
from sublimate.training.objective import Artefact, Batch, Loss, ObjectiveConfig, SoloObjective, Turn
from sublimate.training.players import PlayerConfig, make_player
from sublimate.training.teacher import Teacher, check_guidance, images_and


class ConsistencyTrajectoryConfig(ObjectiveConfig):
    """Options of consistency trajectories; defaults are CTM's for CIFAR-10, as far as DITTO-2's form has them.

    CTM compares by LPIPS and takes 1 to 17 Heun steps of the teacher at a time; here it is pseudo-Huber and DDIM.

    Attributes:
        guidance_scale: the teacher's guidance, which the student takes in; 1 is none.
        grid_steps: steps of the grid that t, u and s are on.
        solver_steps: the teacher's steps from t to u, fewer where s is nearer.
        target_decay: decay per step of the moving average of the student that stands for sg[theta]; None is the
            student itself.
        huber_c: c of sqrt(d^2 + c^2) - c, in units of x0.
        denoising_weight: of CTM's denoising term, for unguided teachers; 0 leaves it out.
        sampling_steps: network calls of the exported student's default sampling.
        sampling_gamma: gamma of that sampling: 0 is deterministic, 1 returns to clean data at every call.
        student: how the student is made and optimised; all of it trains, its new layer too.
    """

    guidance_scale: float = Field(default=1.0, ge=1)
    grid_steps: int = Field(default=18, ge=1)
    solver_steps: int = Field(default=1, ge=1)
    target_decay: float | None = Field(default=0.999, ge=0, lt=1)
    huber_c: float = Field(default=1e-3, gt=0)
    denoising_weight: float = Field(default=0.0, ge=0)
    sampling_steps: int = Field(default=1, ge=1)
    sampling_gamma: float = Field(default=0.0, ge=0, le=1)
    student: PlayerConfig = PlayerConfig(learning_rate=4e-4, adam_weight_decay=0.0)

    @model_validator(mode="after")
    def _what_fits(self) -> ConsistencyTrajectoryConfig:
        if self.student.kind != "full":
            raise ValueError(
                "A student that is told its target has a new layer, which no LoRA holds: set kind to full."
            )
        if self.sampling_gamma > 0 and self.sampling_steps == 1:
            raise ValueError("A single step has no noise to add: set sampling_steps, or sampling_gamma to 0.")
        if self.denoising_weight > 0 and self.guidance_scale != 1:
            raise ValueError(
                "The denoising term teaches the data's own, unguided denoiser: set guidance_scale to 1 or "
                "denoising_weight to 0."
            )
        return self

    def passes(self, step: int = 0) -> float:
        # The teacher's steps and the target's two jumps; the student forward and backward; the jump to clean data
        # behind it, forward and backward to its input; the denoising term.
        solver = self.solver_steps * self.guided_passes(self.guidance_scale != 1)
        return solver + 2 + 3 + 2 + 3 * (self.denoising_weight > 0)


class ConsistencyTrajectory(SoloObjective):
    """Minimises E_{x0, eps, s < t}[ d(x_est, x_target) ], compared at clean data: CTM's soft consistency matching.

        x_est    = G_sg(G_theta(x_t, t, s), s, 0)
        x_target = G_sg(G_sg(Solver(x_t, t -> u), u, s), s, 0),      s <= u < t

    In noise levels sigma/alpha and x = x_t/alpha, G(x, t, s) = (s/t) x + (1 - s/t) g(x, t, s) with g the network's x0
    when it is told s: G(x, t, t) = x for every network, and G(x, t, 0) = g. Times alpha_s that is alpha_s g +
    (sigma_s/sigma_t)(x_t - alpha_t g), a DDIM step with the network's own x0 and eps, on any schedule. The exact flow
    of the guided teacher's ODE has G(G(x, t, u), u, s) = G(x, t, s), hence no loss but the solver's error; with s
    always 0 this is consistency distillation.

    Gradients reach G_theta through the jump from s to 0, whose own weights are held: sg[theta] is a second tree over
    the moving average, in evaluation mode. s is uniform over the grid below t (clean data too), u is `solver_steps`
    below t, but not below s.

    CTM's denoising term adds weight |y(x_t, t, s = t) - y*|^2 in the network's own target y, which for EDM's F is its
    published weighting. Balancing it by gradient norms, as CTM does besides, would couple the samples of a batch.

    A network that is told no target is told clean data, so that a stock pipeline without guidance draws G(x, t, 0).

    Args:
        model: the teacher; stays frozen. Its family's network needs the input for one more number.
        config: options.
    """

    Config = ConsistencyTrajectoryConfig
    paper: ClassVar[str] = "2310.02279"

    def __init__(self, model: Teacher, config: ConsistencyTrajectoryConfig) -> None:
        network = model.denoiser_with_number_input()
        super().__init__(model, config, "student", make_player(network, config.student, ema=True))
        self.solver = GuidedSolver(model, config.grid_steps)
        self.schedule, self.shape = self.solver.schedule, tuple(model.latent_shape)
        check_guidance(self.solver.null, config.guidance_scale)
        self._average: Average | None = None
        self._target: nn.Module | None = None

    @property
    def needs(self) -> frozenset[str]:
        return images_and(self.solver.null)

    @property
    def shardable(self) -> bool:
        return False

    @property
    def student(self) -> nn.Module:
        return self.player.module

    @property
    def target(self) -> nn.Module:
        """sg[theta]: a frozen tree that reads the average, or the student's own weights, where they are stored."""
        # Made at first use, when the student has reached its device and not yet moved.
        if self._target is None:
            held = {name: p.detach() for name, p in self.player.trainable().items()}
            if self.config.target_decay is not None:
                self._average = Average(self.player.trainable, self.config.target_decay)
                held = self._average.values
            self._target = reading(self.student, held).eval()
        return self._target

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        device, steps = batch["images"].device, self.config.grid_steps
        index = batch.random.integers(steps, device)
        ahead = (batch.random.uniform(device) * (steps - index)).long()
        return batch.adding(t=index, s=index + 1 + ahead, eps=batch.random.normal(self.shape, device))

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        config, grid = self.config, self.solver.grid_on(batch["t"].device)
        t, s = grid[batch["t"]], grid[batch["s"]]
        clean = torch.full_like(t, self.schedule.t_clean)
        x_t = add_noise(self.schedule, batch["images"], batch["eps"], t)
        with torch.no_grad():
            x_u, u = self._solved(x_t, batch)
            target = self.jump(self.target, self.jump(self.target, x_u, u, s, batch), s, clean, batch)
        estimate = self.jump(self.target, self.jump(self.student, x_t, t, s, batch), s, clean, batch)
        consistency = pseudo_huber_loss(estimate, target, config.huber_c).mean()
        if config.denoising_weight == 0:
            return Loss(consistency)
        here = self.student(x_t, t, batch.condition.replace(target_time=t))
        denoising = denoising_loss(here, batch["images"], batch["eps"]).mean()
        logs = {"student/consistency": consistency, "student/denoising": denoising}
        return Loss(consistency + config.denoising_weight * denoising, logs)

    def jump(self, network: nn.Module, x: Tensor, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """G(x, t, s) of a network; x (batch, ...) at t, times float64 (batch,)."""
        return jump(network, self.schedule, x, t, s, batch.condition.replace(target_time=s))

    def _solved(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's x_u from x_t, and u."""
        grid = self.solver.grid_on(x.device)
        index = batch["t"]
        for _ in range(self.config.solver_steps):
            lower = torch.minimum(index + 1, batch["s"])
            t = grid[index].clamp_min(self.schedule.t_min)
            stepped = self.solver.step(x, t, grid[lower], batch.condition, self.config.guidance_scale)
            x, index = torch.where(per_sample(lower > index, x), stepped, x), lower
        return x, grid[index]

    def after_step(self, step: int) -> None:
        if self._average is not None:
            self._average.update()

    def state(self) -> dict[str, Tensor]:
        _ = self.target
        return target_state(self._average)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        _ = self.target
        load_target(self._average, state)

    def exports(self) -> Artefact:
        few, config = None, self.config
        if config.sampling_steps > 1:
            few = FewSteps("trajectory", steps=config.sampling_steps, eta=config.sampling_gamma)
        return Artefact("weights", self.student, few_steps=few)


def reading(module: nn.Module, held: Mapping[str, Tensor]) -> nn.Module:
    """A second, frozen module tree that reads some parameters from given tensors and shares the others.

    It has gradients to its inputs only, and follows every change of those tensors in place.

    Args:
        module: stays as it is.
        held: by the parameters' names, shaped like them.
    """
    memo: dict[int, object] = {id(buffer): buffer for buffer in module.buffers()}
    for name, p in module.named_parameters():
        memo[id(p)] = nn.Parameter(held[name], requires_grad=False) if name in held else p
    return copy.deepcopy(module, memo)
