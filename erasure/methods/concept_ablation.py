"""Concept ablation: at noised pictures of the anchor, the concept's prompt is taught what the anchor's says."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from sublimate.erasure.fine_tuning import FineTuningEraser
from sublimate.erasure.pictured import PicturedConfig, PicturedObjective
from sublimate.erasure.weights import Rule
from sublimate.training.losses import denoising_loss
from sublimate.training.objective import Batch, Loss, Turn


class ConceptAblationConfig(PicturedConfig):
    """Options of concept ablation; learning rate, steps and batch are the authors' for one GPU.

    Attributes:
        weights: they train keys and values of cross-attention, "x-strict".
        target: "model" compares with the student's own prediction for the anchor, "noise" with the noise that was
            added to the anchor's picture.
        prior: weight of the denoising loss on anchor pictures with the anchor's prompt, for anchors whose name is
            part of the concept's ("cat" for "grumpy cat").

    The others are `PicturedConfig`'s and `FineTuningConfig`'s; `retain`, which weighs the denoising loss on pictures
    of preserved concepts, is an addition.
    """

    weights: Rule = "x-strict"
    learning_rate: float = Field(default=8e-6, gt=0)
    max_train_steps: int = Field(default=200, ge=1)
    train_batch_size: int = Field(default=4, ge=1)
    target: Literal["model", "noise"] = "model"
    prior: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _compares(self) -> Self:
        if self.target == "noise" and self.space != "output":
            raise ValueError("target = noise is the network's own loss and has no space: leave it out.")
        return self

    def passes(self, step: int = 0) -> float:
        """Without the pictures; for a request with preserved concepts, if `retain` is set."""
        return 3 + (self.target == "model") + 3 * (self.prior > 0) + 3 * (self.retain > 0)


class ConceptAblationObjective(PicturedObjective):
    """E |y_theta(x_t, c, t) - sg[y_theta(x_t, c_a, t)]|^2 at noised pictures x_t of the anchor's prompt c_a.

    The target is the *current* network's, so the anchor may drift with what is trained; `prior` holds it.
    """

    Config = ConceptAblationConfig
    paper: ClassVar[str] = "2303.13516"
    config: ConceptAblationConfig
    shows = "anchor"

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        config = self.config
        if config.target == "model":
            error = self.swap_error(batch)
        else:
            error = denoising_loss(self.predict(batch, self.erased), batch["x0"], batch["eps"]).mean()
        terms = {"erase": (1.0, error)}
        if config.prior > 0:
            prior = denoising_loss(self.predict(batch, self.anchors), batch["x0"], batch["eps"]).mean()
            terms["prior"] = config.prior, prior
        return self.weighed(batch, terms)


class ConceptAblation(FineTuningEraser):
    """Ablating Concepts (Kumari et al. 2023): the concept's distribution becomes its anchor's."""

    Config = ConceptAblationConfig
    paper: ClassVar[str] = ConceptAblationObjective.paper
    objective = ConceptAblationObjective
    uses_kept_images = True
