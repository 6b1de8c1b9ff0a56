"""Denoising: the plain diffusion objective, which trains or fine-tunes a multi-step model (Ho et al. 2020)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import nn

from sublimate.diffusion.predictions import add_noise
from sublimate.training.losses import denoising_loss
from sublimate.training.objective import Artefact, Batch, Loss, ObjectiveConfig, SoloObjective, Turn
from sublimate.training.players import PlayerConfig, make_player
from sublimate.training.teacher import Trainee, images_and


class DenoisingConfig(ObjectiveConfig):
    """Options of denoising training.

    Attributes:
        condition_dropout: fraction of samples trained on the null condition, for classifier-free guidance.
        time_range: noise levels used, as fractions of the schedule's time.
        student: how the network is made and optimised.
    """

    condition_dropout: float = Field(default=0.1, ge=0, le=1)
    time_range: tuple[float, float] = (0.0, 1.0)
    student: PlayerConfig = PlayerConfig()

    def passes(self, step: int = 0) -> float:
        return 3


class Denoising(SoloObjective):
    """E |y_theta(alpha_t x0 + sigma_t eps, t, c) - y|^2 with y the network's own target (eps, v, flow, F).

    Args:
        model: where training starts; stays as it is.
        config: options.
    """

    Config = DenoisingConfig
    paper: ClassVar[str] = "2006.11239"

    def __init__(self, model: Trainee, config: DenoisingConfig) -> None:
        super().__init__(model, config, "student", make_player(model.denoiser, config.student, ema=True))
        self.schedule = model.denoiser.schedule
        self.shape, self.null = tuple(model.latent_shape), model.null_condition()

    @property
    def needs(self) -> frozenset[str]:
        return images_and(self.null)

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        x0 = batch["images"]
        t = self.schedule.uniform_time(batch.random.uniform(x0.device), *self.config.time_range)
        dropped = batch.random.uniform(x0.device) < self.config.condition_dropout
        return batch.adding(t=t, eps=batch.random.normal(self.shape, x0.device), dropped=dropped)

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        x0, eps, t = batch["images"], batch["eps"], batch["t"]
        condition = batch.condition.dropping(batch["dropped"], self.null) if self.null else batch.condition
        prediction = self.student(add_noise(self.schedule, x0, eps, t), t, condition)
        return Loss(denoising_loss(prediction, x0, eps).mean())

    @property
    def student(self) -> nn.Module:
        return self.player.module

    def exports(self) -> Artefact:
        return Artefact(self.config.student.artefact, self.student, as_base=True)
