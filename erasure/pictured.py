"""What erasers share that train on noised pictures of concepts, as the model itself draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sublimate.diffusion.predictions import Prediction
from sublimate.erasure import targets
from sublimate.erasure.fine_tuning import FineTuningConfig, StudentObjective
from sublimate.erasure.latent_bank import LatentBank, drawn_bank
from sublimate.erasure.prompt_bank import PromptBank, anchor_bank
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.trajectories import noised
from sublimate.pipelines.model import Model
from sublimate.training.losses import denoising_loss
from sublimate.training.objective import Batch, Turn
from sublimate.training.randomness import SampleRandom


class PicturedConfig(FineTuningConfig):
    """Options of training on pictures that the unedited model draws once, before training.

    Attributes:
        images: pictures per prompt.
        sampling_steps: DDIM steps of each.
        start_guidance: guidance of that sampling; 1 is none.
        space: the quantity in which the student is compared with itself; see `erasure/targets.py`.
    """

    images: int = Field(default=20, ge=1)
    sampling_steps: int = Field(default=50, ge=1)
    start_guidance: float = Field(default=7.5, ge=0)
    space: targets.Space = "output"


class PicturedObjective(StudentObjective):
    """Trains the student at noised pictures: of the concepts, or of the prompts with anchors in their places.

    Row i of `erased` and row i of `anchors` are the same prompt with the concept and with its anchor; `pictures` are
    of the one or the other, as `shows` says.
    """

    config: PicturedConfig
    shows: Literal["concept", "anchor"]

    def __init__(self, model: Model, config: PicturedConfig, request: Request, *, seed: int = 0) -> None:
        super().__init__(model, config, request, seed=seed)
        self.anchors = anchor_bank(model, request.erase, config.templates)

        def pictures(concepts: Sequence[Concept], anchored: bool) -> LatentBank:
            return drawn_bank(
                model,
                concepts,
                config.templates,
                anchored=anchored,
                count=config.images,
                steps=config.sampling_steps,
                guidance_scale=config.start_guidance,
                seed=seed,
                batch_size=config.train_batch_size,
            )

        self.pictures = pictures(request.erase, self.shows == "anchor")
        self.kept_pictures = pictures(request.preserve, False) if self.kept else None

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        """Adds noised pictures for the erasing terms, and as `kept_...` for `retain_error`."""
        batch = batch.adding(**self._drawn(batch.random, self.erased, self.pictures))
        if self.kept is not None and self.kept_pictures is not None:
            kept = self._drawn(batch.random, self.kept, self.kept_pictures)
            batch = batch.adding(**{f"kept_{name}": value for name, value in kept.items()})
        return batch

    def _drawn(self, random: SampleRandom, bank: PromptBank, pictures: LatentBank) -> dict[str, Tensor]:
        rows = bank.draw(random)
        return self.noise(random, rows, pictures.draw(rows, random, self.device))

    def noise(self, random: SampleRandom, rows: Tensor, x0: Tensor) -> dict[str, Tensor]:
        """Rows of prompts and their pictures with noise: `rows`, `x0`, `eps`, `x_t` and `t`, each (batch, ...)."""
        eps, u = random.normal(self.shape, self.device), random.uniform(self.device)
        x_t, t = noised(self.frozen.schedule, x0, eps, u)
        return {"rows": rows, "x0": x0, "eps": eps, "x_t": x_t, "t": t}

    def predict(self, batch: Batch, bank: PromptBank) -> Prediction:
        """The student at the batch's x_t, told the batch's rows of a bank."""
        x_t = batch["x_t"]
        return self.student(x_t, batch["t"], bank.condition(batch["rows"], x_t.device))

    def swap_error(self, batch: Batch) -> Tensor:
        """|y(x_t, c) - sg[y(x_t, c_a)]|^2 of the current student, averaged; c_a is the prompt with the anchor."""
        prediction = self.predict(batch, self.erased)
        with torch.no_grad():
            swapped = self.predict(batch, self.anchors)
        return targets.squared_error(prediction, replace(prediction, output=swapped.output), self.config.space).mean()

    def retain_error(self, batch: Batch, kept: PromptBank) -> Tensor:
        """The denoising loss on noised pictures of preserved concepts."""
        x_t = batch["kept_x_t"]
        prediction = self.student(x_t, batch["kept_t"], kept.condition(batch["kept_rows"], x_t.device))
        return denoising_loss(prediction, batch["kept_x0"], batch["kept_eps"]).mean()
