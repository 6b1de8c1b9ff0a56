"""All but One: moves the guidance towards a concept to that towards its anchor, and pins the unconditional branch."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from sublimate.erasure import targets
from sublimate.erasure.fine_tuning import FineTuningConfig, FineTuningEraser
from sublimate.erasure.request import Request
from sublimate.erasure.rollouts import RolloutConfig, RolloutObjective
from sublimate.pipelines.model import Model
from sublimate.training.objective import Batch, Loss, Turn


class AllButOneConfig(RolloutConfig, FineTuningConfig):
    """Options of All but One. No code was published: what the abstract does not say follows ESD.

    Attributes:
        null_pin: weight of |student - frozen|^2 without text.
        repulsion: 0 leads to the anchor; above, away from the concept: the target is -repulsion times its guidance,
            and anchors are not read.
        detach_null: keep the guidance term from pushing the unconditional branch; see `targets.guidance_error`.

    The others are `RolloutConfig`'s and `FineTuningConfig`'s.
    """

    updates_per_rollout: int = Field(default=5, ge=1)
    null_pin: float = Field(default=1.0, ge=0)
    repulsion: float = Field(default=0.0, ge=0)
    detach_null: bool = False

    @property
    def update_passes(self) -> float:
        return 2 + 3 + 3


class AllButOneObjective(RolloutObjective):
    """E |(u - n) - (u*_a - n*)|^2 + null_pin E |n - n*|^2 (arXiv 2312.12807, after its abstract).

    u and n are the student's predictions for the concept and without text, u*_a and n* the frozen network's for the
    prompt with the anchor in the concept's place and without text. An anchor that leaves nothing of the prompt makes
    the target zero: the concept then has no say.
    """

    Config = AllButOneConfig
    paper: ClassVar[str] = "2312.12807"
    config: AllButOneConfig

    def __init__(self, model: Model, config: AllButOneConfig, request: Request, *, seed: int = 0) -> None:
        super().__init__(model, config, request, seed=seed)
        if config.repulsion and (anchored := [concept for concept in request.erase if concept.anchor]):
            raise ValueError(
                f"repulsion leads away from {anchored[0].name!r}, not to {anchored[0].anchor!r}: leave out the anchor."
            )
        self.anchors = self.bank(model, request.erase, config.templates, anchored=True)

    def aim(self, batch: Batch) -> Batch:
        x_t, t, repulsion = batch["x_t"], batch["t"], self.config.repulsion
        null = self.frozen(x_t, t, self.null.to(x_t.device))
        aimed = self.frozen(x_t, t, self.asked(batch, None if repulsion else self.anchors)).output
        if repulsion:
            aimed = null.output - repulsion * (aimed - null.output)
        return batch.adding(aimed=aimed, null=null.output)

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        config, x_t, t = self.config, batch["x_t"], batch["t"]
        u, n = self.student(x_t, t, self.asked(batch)), self.student(x_t, t, self.null.to(x_t.device))
        aimed, null = replace(u, output=batch["aimed"]), replace(n, output=batch["null"])
        guidance = targets.guidance_error(u, n, aimed, null, config.space, detach_null=config.detach_null)
        pinned = targets.squared_error(n, null, config.space)
        return self.weighed(batch, {"erase": (1.0, guidance.mean()), "null": (config.null_pin, pinned.mean())})


class AllButOne(FineTuningEraser):
    """All but One (Hong, Lee & Woo 2024): surgery on the guidance term alone.

    ESD moves the conditional prediction as a whole, and with it whatever the unconditional one shares. Here both of
    the student's branches take part: their difference is moved, the unconditional one stays.
    """

    Config = AllButOneConfig
    paper: ClassVar[str] = AllButOneObjective.paper
    objective = AllButOneObjective
