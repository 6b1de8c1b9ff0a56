"""What erasers share that train on noised pictures of concepts, as the model itself draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Self

import torch
from torch import Tensor

from sublimate.diffusion.predictions import Prediction
from sublimate.erasure import targets
from sublimate.erasure.fine_tuning import FineTuningConfig, StudentObjective
from sublimate.erasure.latent_bank import LatentBank, LatentBankConfig, drawn_bank
from sublimate.erasure.prompt_bank import PromptBank
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.trajectories import noised
from sublimate.pipelines.model import Model
from sublimate.training.losses import denoising_loss
from sublimate.training.objective import Batch, Turn
from sublimate.training.randomness import SampleRandom


class DrawingConfig(LatentBankConfig, FineTuningConfig):
    """Options of training on pictures that the unedited model draws once, before training.

    They are `LatentBankConfig`'s and `FineTuningConfig`'s.
    """

    def brief(self) -> Self:
        return self.model_copy(update={"images": min(self.images, self.train_batch_size), "sampling_steps": 1})

    def drawn(self, model: Model, concepts: Sequence[Concept], *, anchored: bool = False, seed: int) -> LatentBank:
        """`drawn_bank` of the concepts in the templates."""
        size = self.train_batch_size
        return drawn_bank(model, concepts, self.templates, self, anchored=anchored, seed=seed, batch_size=size)


class PicturedConfig(DrawingConfig):
    """Options of comparing the student with itself at noised pictures.

    Attributes:
        space: the quantity that is compared; see `erasure/targets.py`.

    The others are `DrawingConfig`'s and `FineTuningConfig`'s.
    """

    space: targets.Space = "output"


class KeptPicturesObjective(StudentObjective):
    """Holds preserved concepts by the denoising loss on their pictures."""

    config: DrawingConfig
    reads_null = False

    def __init__(self, model: Model, config: DrawingConfig, request: Request, *, seed: int = 0) -> None:
        super().__init__(model, config, request, seed=seed)
        self.kept_pictures = config.drawn(model, request.preserve, seed=seed) if self.kept else None

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        """Adds noised pictures for `retain_error`, under names that start with `kept_`."""
        if self.kept is None or self.kept_pictures is None:
            return batch
        kept = self.drawn(batch.random, self.kept, self.kept_pictures)
        return batch.adding(**{f"kept_{name}": value for name, value in kept.items()})

    def drawn(self, random: SampleRandom, bank: PromptBank, pictures: LatentBank) -> dict[str, Tensor]:
        """Noised pictures of prompts from a bank, as `noise` has them."""
        rows = bank.draw(random)
        return self.noise(random, rows, pictures.draw(rows, random, self.device))

    def noise(self, random: SampleRandom, rows: Tensor, x0: Tensor) -> dict[str, Tensor]:
        """Rows of prompts and their pictures with noise: `rows`, `x0`, `eps`, `x_t` and `t`, each (batch, ...)."""
        eps, u = random.normal(self.shape, self.device), random.uniform(self.device)
        x_t, t = noised(self.frozen.schedule, x0, eps, u)
        return {"rows": rows, "x0": x0, "eps": eps, "x_t": x_t, "t": t}

    def retain_error(self, batch: Batch, kept: PromptBank) -> Tensor:
        """The denoising loss on noised pictures of preserved concepts."""
        x_t = batch["kept_x_t"]
        prediction = self.student(x_t, batch["kept_t"], kept.condition(batch["kept_rows"], x_t.device))
        return denoising_loss(prediction, batch["kept_x0"], batch["kept_eps"]).mean()


class PicturedObjective(KeptPicturesObjective):
    """Trains the student at noised pictures: of the concepts, or of the prompts with anchors in their places.

    Row i of `erased` and row i of `anchors` are the same prompt with the concept and with its anchor; `pictures` are
    of the one or the other, as `shows` says.
    """

    config: PicturedConfig
    shows: Literal["concept", "anchor"]

    def __init__(self, model: Model, config: PicturedConfig, request: Request, *, seed: int = 0) -> None:
        super().__init__(model, config, request, seed=seed)
        self.anchors = self.bank(model, request.erase, config.templates, anchored=True)
        self.pictures = config.drawn(model, request.erase, anchored=self.shows == "anchor", seed=seed)

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        """Adds noised pictures for the erasing terms, and as `kept_...` for `retain_error`."""
        return super().prepare(turn, batch.adding(**self.drawn(batch.random, self.erased, self.pictures)), step)

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
