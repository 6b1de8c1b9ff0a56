"""Consistency distillation: few steps by agreeing along the teacher's guided trajectories (Song 2023, Luo 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.func import functional_call

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.predictions import Prediction, add_noise
from sublimate.pipelines.few_steps import FewSteps
from sublimate.training.consistency import GuidedSolver, jump, load_target, target_state
from sublimate.training.ema import Average
from sublimate.training.losses import pseudo_huber_loss, squared_loss
from sublimate.training.objective import Artefact, Batch, Loss, ObjectiveConfig, SoloObjective, Turn
from sublimate.training.players import PlayerConfig, make_player
from sublimate.training.teacher import Scales, Teacher, check_guidance, check_one_guidance, images_and, scales_from


class ConsistencyDistillationConfig(ObjectiveConfig):
    """Options of consistency distillation; defaults are those of diffusers' script for latent consistency models.

    That script counts guidance from 0, so its range [5, 15] is [6, 16] here.

    Attributes:
        guidance_input: the student is told the scale (an embedding that stock pipelines fill from guidance_scale);
            needs a network with that input and student.kind "full". Otherwise guidance is baked in.
        guidance_scale: the teacher's guidance, 1 is none; with a range, what a student that is told the scale is
            sampled with by default.
        guidance_range: the teacher's guidance is drawn from it uniformly, per sample; None always uses the scale.
        grid_steps: the teacher's steps from noise to data; each skips 1000/grid_steps times of a table.
        target_decay: decay per step of the moving average of the student that gives the target; None is the student
            itself, without gradient.
        loss: "huber" is sqrt(d^2 + c^2) - c, "l2" is d^2, as means over elements.
        huber_c: c, in units of x0.
        sampling_steps: network calls of the exported student's default sampling.
        student: how the student is made and optimised.
    """

    guidance_input: bool = True
    guidance_scale: float = Field(default=8.5, ge=1)
    guidance_range: Annotated[tuple[float, float], scales_from(1)] | None = (6.0, 16.0)
    grid_steps: int = Field(default=50, ge=1)
    target_decay: float | None = Field(default=0.95, ge=0, lt=1)
    loss: Literal["huber", "l2"] = "huber"
    huber_c: float = Field(default=1e-3, gt=0)
    sampling_steps: int = Field(default=4, ge=1)
    student: PlayerConfig = PlayerConfig(learning_rate=1e-6)

    @model_validator(mode="after")
    def _reads_its_scale(self) -> Self:
        usual, (low, high) = type(self).model_fields["guidance_scale"].default, self.scales
        if self.guidance_input and not low <= self.guidance_scale <= high:
            raise ValueError(
                f"guidance_scale is {self.guidance_scale}, which the student would be sampled with and is never told: "
                f"choose one of guidance_range, {low} to {high}."
            )
        if not self.guidance_input:
            check_one_guidance(self.guidance_range, self.guidance_scale, usual)
        return self

    @property
    def scales(self) -> Scales:
        """The teacher's guidance."""
        return Scales.of(self.guidance_range, self.guidance_scale)

    @property
    def sample_guidance(self) -> float:
        return self.guidance_scale if self.guidance_input else sum(self.scales) / 2

    def passes(self, step: int = 0) -> float:
        # The teacher's step, the student forward and backward, the target.
        return self.guided_passes(self.scales.guided) + 3 + 1


class ConsistencyDistillation(SoloObjective):
    """Minimises E_{x0, n, w, eps}[ d(f_theta(x_t, w, c, t), f_target(x_s, w, c, s)) ]   (Luo et al. 2023, alg. 1).

    t = t_n and s = t_{n+1} are neighbours on the grid, x_t = alpha_t x0 + sigma_t eps, and x_s is one DDIM step of the
    teacher with guidance w from x_t. A function that is constant along the teacher's trajectories and the identity at
    clean data maps every x_t to its trajectory's end: for the exact one the loss vanishes up to the solver's error.

    f is the network's x0, and x itself at clean data, so f(x, t_clean) = x holds for every parametrization and the
    last step's target is the teacher's own x0. Song et al. and Luo et al. write f = c_skip(t) x + c_out(t) F instead.
    EDM's preconditioning is that form with sigma_min = 0; in latent consistency models, with c_skip = .25/((10 t)^2 +
    .25) on a table, c_skip is below 1e-5 and 1 - c_out below 1e-5 from t = 19 on, so f is the network's x0 there too.

    Args:
        model: the teacher; stays frozen.
        config: options.
    """

    Config = ConsistencyDistillationConfig
    paper: ClassVar[str] = "2310.04378"

    def __init__(self, model: Teacher, config: ConsistencyDistillationConfig) -> None:
        network = model.denoiser_with_number_input() if config.guidance_input else model.denoiser
        if config.guidance_input and config.student.kind != "full" and not model.denoiser.reads_guidance:
            raise ValueError(
                "A student that is told the guidance scale has a new layer, which no LoRA holds: set "
                "objective.student.kind to full, or objective.guidance_input to false."
            )
        super().__init__(model, config, "student", make_player(network, config.student, ema=True))
        self.solver = GuidedSolver(model, config.grid_steps)
        self.schedule, self.shape = self.solver.schedule, tuple(model.latent_shape)
        option = "guidance_scale" if config.guidance_range is None else "guidance_range"
        check_guidance(self.solver.null, *config.scales, option=option)
        self.few_steps = FewSteps(
            "consistency",
            steps=config.sampling_steps,
            grid_steps=config.grid_steps,
            guidance_scale=config.guidance_scale if config.guidance_input else 1.0,
        )
        self._average: Average | None = None

    @property
    def needs(self) -> frozenset[str]:
        return images_and(self.solver.null)

    @property
    def shardable(self) -> bool:
        return self.config.target_decay is None

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        device = batch["images"].device
        t, s = self.solver.neighbours(batch.random.integers(self.config.grid_steps, device))
        batch = batch.adding(t=t, s=s, eps=batch.random.normal(self.shape, device))
        return self.config.scales.drawn(batch, device)

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        t, s = batch["t"], batch["s"]
        condition = self._told(batch)
        x_t = add_noise(self.schedule, batch["images"], batch["eps"], t)
        with torch.no_grad():
            x_s = self.solver.step(x_t, t, s, batch.condition, self.config.scales.in_batch(batch))
            target = self._to_data(self.target, x_s, s, condition)
        x0 = self._to_data(self.player.module, x_t, t, condition)
        if self.config.loss == "l2":
            return Loss(squared_loss(x0, target).mean())
        return Loss(pseudo_huber_loss(x0, target, self.config.huber_c).mean())

    def target(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """The student's moving average, or the student itself."""
        student = self.player.module
        if self._averaged is None:
            return student(x_t, t, condition)
        return functional_call(student, self._averaged.values, (x_t, t, condition))

    def _to_data(self, network, x: Tensor, t: Tensor, condition: Condition) -> Tensor:  # type: ignore[no-untyped-def]
        """f(x, t)."""
        return jump(network, self.schedule, x, t, torch.full_like(t, self.schedule.t_clean), condition)

    def _told(self, batch: Batch) -> Condition:
        """What student and target are told."""
        if not self.config.guidance_input:
            return batch.condition
        scale = torch.as_tensor(self.config.scales.in_batch(batch), dtype=torch.float32, device=batch["t"].device)
        return batch.condition.replace(guidance=scale.expand(len(batch)))

    @property
    def _averaged(self) -> Average | None:
        # Made at first use, when the student has reached its device and not yet moved.
        if self._average is None and self.config.target_decay is not None:
            self._average = Average(self.player.trainable, self.config.target_decay)
        return self._average

    def after_step(self, step: int) -> None:
        if self._averaged is not None:
            self._averaged.update()

    def state(self) -> dict[str, Tensor]:
        return target_state(self._averaged)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        load_target(self._averaged, state)

    def exports(self) -> Artefact:
        return Artefact(self.config.student.artefact, self.player.module, few_steps=self.few_steps)
