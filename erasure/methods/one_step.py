"""Erasing from a student of one or few steps: what it draws for a concept becomes what it drew for the anchor."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.predictions import Prediction, add_noise
from sublimate.erasure.fine_tuning import FineTuningConfig, FineTuningEraser, StudentObjective
from sublimate.erasure.prompt_bank import PromptBank
from sublimate.erasure.request import Request
from sublimate.erasure.trajectories import at_start
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.model import Model
from sublimate.training.losses import squared_loss
from sublimate.training.objective import Batch, Loss, Turn


class OneStepConfig(FineTuningConfig):
    """Options of erasing from a student of one or few steps; the paper trains masks, so its rates say nothing here.

    Attributes:
        times: the descending schedule times at which the student is called; None reads them from the checkpoint, as
            this library's exports have them. One-step Turbo checkpoints take (999,).
        guidance_scale: of those calls, for every network: told or applied as it wants it; None reads it from the
            checkpoint, and is none where that says nothing.

    `retain` weighs the same error on preserved concepts, whose target is the unedited student's own image.
    """

    learning_rate: float = Field(default=3e-5, gt=0)
    max_train_steps: int = Field(default=200, ge=1)
    train_batch_size: int = Field(default=8, ge=1)
    times: tuple[float, ...] | None = Field(default=None, min_length=1)

    def passes(self, step: int = 0) -> float:
        """For an unguided student of one step, and a request with preserved concepts if `retain` is set."""
        return 3 + 1 + (3 + 1) * (self.retain > 0)


class OneStepObjective(StudentObjective):
    """E |G_theta(z, c) - G*(z, c_a)|^2 + retain E |G_theta(z, c_r) - G*(z, c_r)|^2, G the student's x0 from noise z.

    This is the loss that Minimalist Concept Erasure puts on pruning masks, here on weights. Its pointwise minimiser is
    the unedited student's map under the anchor's prompt; no sampling path is needed. A student of few steps is trained
    at each of its times alike, where its x_t is its own first x0, noised.
    """

    Config = OneStepConfig
    paper: ClassVar[str] = "2507.13386"
    config: OneStepConfig
    reads_null = False
    every_level = False

    def __init__(self, model: Model, config: OneStepConfig, request: Request, *, seed: int = 0) -> None:
        super().__init__(model, config, request, seed=seed)
        self.times, self.scale = _calls(model, config)
        self.anchors = self.bank(model, request.erase, config.templates, anchored=True)

    def guidance_told(self, model: Model, config: OneStepConfig) -> float | None:
        return None  # `predict` tells it, or applies it

    def predict(self, network: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """A network's prediction with the guidance that belongs to it."""
        return guided(network, x_t, t, condition, self.null.to(x_t.device), self.scale)

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        rows = self.erased.draw(batch.random)
        asked, aimed = (bank.condition(rows, self.device) for bank in (self.erased, self.anchors))
        x_t, t = self._inputs(batch, asked)
        batch = batch.adding(rows=rows, x_t=x_t, t=t, target=self.predict(self.frozen, x_t, t, aimed).x0)
        if self.kept is None:
            return batch
        rows = self.kept.draw(batch.random)
        asked = self.kept.condition(rows, self.device)
        x_t, t = self._inputs(batch, asked)
        target = self.predict(self.frozen, x_t, t, asked).x0
        return batch.adding(kept_rows=rows, kept_x_t=x_t, kept_t=t, kept_target=target)

    def _inputs(self, batch: Batch, condition: Condition) -> tuple[Tensor, Tensor]:
        """What the student is given at one of its times per sample: x_t and t."""
        schedule, z = self.frozen.schedule, batch.random.normal(self.shape, self.device)
        x_t, t = at_start(schedule, z, self.times[0])
        if len(self.times) == 1:
            return x_t, t
        places = batch.random.integers(len(self.times), self.device)
        eps = batch.random.normal(self.shape, self.device)
        later, times = places > 0, torch.tensor(self.times, dtype=torch.float64, device=self.device)[places]
        if later.any():
            x0 = self.predict(self.student, x_t[later], t[later], condition.index(later)).x0
            x_t[later] = add_noise(schedule, x0, eps[later], times[later]).to(x_t.dtype)
        return x_t, times

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        return self.weighed(batch, {"erase": (1.0, self._error(batch, self.erased))})

    def retain_error(self, batch: Batch, kept: PromptBank) -> Tensor:
        return self._error(batch, kept, "kept_")

    def _error(self, batch: Batch, bank: PromptBank, prefix: str = "") -> Tensor:
        x_t, t = batch[f"{prefix}x_t"], batch[f"{prefix}t"]
        prediction = self.predict(self.student, x_t, t, bank.condition(batch[f"{prefix}rows"], x_t.device))
        return squared_loss(prediction.x0, batch[f"{prefix}target"]).mean()


def _calls(model: Model, config: OneStepConfig) -> tuple[tuple[float, ...], float]:
    """The times of the student's calls and their guidance scale.

    Raises:
        ValueError: when neither options nor checkpoint say, or the student is told where its jumps end.
    """
    few = model.defaults.get("few_steps")
    if few is not None and FewSteps.from_dict(few).sampler == "trajectory":
        raise ValueError(f"{model.source} is told where its jumps end, which one_step does not train: use uce.")
    recorded = float(model.defaults.get("guidance_scale", 1.0))
    scale = recorded if config.guidance_scale is None else config.guidance_scale
    if config.times is not None:
        given = FewSteps("consistency", steps=len(config.times), times=config.times)
        return given.call_times(model.schedule), scale
    if few is not None:
        return FewSteps.from_dict(few).call_times(model.schedule), scale
    if model.defaults.get("steps") == 1:
        return (float(model.defaults.get("start", model.schedule.t_max)),), scale
    raise ValueError(f"{model.source} does not say when it is called, as students of few steps do: set times.")


class OneStep(FineTuningEraser):
    """Erasing from students of one or few steps, by matching x0 at fixed noise, as Minimalist Concept Erasure does."""

    Config = OneStepConfig
    paper: ClassVar[str] = OneStepObjective.paper
    objective = OneStepObjective
