"""ESD: fine-tunes the denoiser to answer a concept with guidance away from it."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from sublimate.erasure import keep, targets
from sublimate.erasure.fine_tuning import FineTuningConfig, FineTuningEraser
from sublimate.erasure.request import Request
from sublimate.erasure.rollouts import RolloutConfig, RolloutObjective
from sublimate.pipelines.model import Model
from sublimate.training.objective import Batch, Loss, Turn


class ESDConfig(RolloutConfig, FineTuningConfig):
    """Options of ESD; the defaults are the paper's ESD-x, the keep terms are additions that start at zero or with
    `preserve` alone.

    Attributes:
        weights: "x" for what is asked for by name (styles, persons), "u" for what must go whatever the prompt says.
        eta: strength of the negative guidance as the paper counts it. The authors' rewrite of 2025 counts one more:
            its default 2 is 1 here.
        null_pin: weight of |student - frozen|^2 without text, at the x_t of the erased concept.
        l1: weight of the mean absolute change of the trained weights.

    The others are `RolloutConfig`'s and `FineTuningConfig`'s: the "student" samples x_t in the paper, the "frozen"
    network in the rewrite, one update per sampling in both. `Concept.anchor` is not read: ESD leads away from a
    concept, not to another.
    """

    eta: float = Field(default=1.0, ge=0)
    null_pin: float = Field(default=0.0, ge=0)
    l1: float = Field(default=0.0, ge=0)

    def of_single_weights(self) -> str | None:
        return "l1" if self.l1 > 0 else None

    @property
    def update_passes(self) -> float:
        """Without `within`, which adds 1."""
        return 2 + 3 + (3 if self.null_pin else 0)


class ESDObjective(RolloutObjective):
    """E |y_theta(x_t, c, t) - [y*(x_t, t) - eta (y*(x_t, c, t) - y*(x_t, t))]|^2, * being the frozen network.

    A network that reads the guidance scale s (FLUX.1 [dev]) is told it in all three: y(c, s) stands for
    y + s (y_c - y), so that y(c, s) - y(s) is s (y_c - y), and the target is y - eta s (y_c - y). That is what others
    draw with the guidance s once they have been trained, so eta has the same meaning in both.
    """

    Config = ESDConfig
    paper: ClassVar[str] = "2303.07345"
    config: ESDConfig

    def __init__(self, model: Model, config: ESDConfig, request: Request, *, seed: int = 0) -> None:
        super().__init__(model, config, request, seed=seed)
        # A second copy of what trains, for who asks for it.
        before = self.player.trainable() if config.l1 > 0 else {}
        self.originals = {name: parameter.detach().clone() for name, parameter in before.items()}
        self.context = None if request.within is None else self.bank(model, [request.within], config.templates)

    def sample(self, batch: Batch) -> dict[str, Tensor]:
        if self.context is None:
            return super().sample(batch)
        concepts, rows = self.erased.draw(batch.random), self.context.draw(batch.random)
        rolled = self.roll(batch, self.context, rows)
        return {"concept_rows": concepts, "rows": rows, **rolled, **self.sample_kept(batch)}

    def aim(self, batch: Batch) -> Batch:
        x_t, t = batch["x_t"], batch["t"]
        y_null = self.frozen(x_t, t, self.null.to(x_t.device))
        if self.context is None:
            y_concept = self.frozen(x_t, t, self.asked(batch))
            target = targets.negative_guidance(y_null, y_concept, self.config.eta)
        else:
            y_concept = self.frozen(x_t, t, self.erased.condition(batch["concept_rows"], x_t.device))
            y_context = self.frozen(x_t, t, self.asked(batch, self.context))
            target = targets.within(y_context, y_concept, y_null, self.config.eta)
        return batch.adding(target=target.output, null=y_null.output)

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        config, x_t, t = self.config, batch["x_t"], batch["t"]
        prediction = self.student(x_t, t, self.asked(batch, self.context))
        target = replace(prediction, output=batch["target"])
        terms = {"erase": (1.0, targets.squared_error(prediction, target, config.space).mean())}
        if config.null_pin > 0:
            free = self.student(x_t, t, self.null.to(x_t.device))
            pinned = replace(free, output=batch["null"])
            terms["null"] = config.null_pin, targets.squared_error(free, pinned, config.space).mean()
        if config.l1 > 0:
            originals = {name: value.to(x_t.device) for name, value in self.originals.items()}
            terms["l1"] = config.l1, keep.l1_drift(self.player.trainable(), originals)
        return self.weighed(batch, terms)


class ESD(FineTuningEraser):
    """Erased Stable Diffusion (Gandikota et al. 2023).

    With `within`, the student is trained under the context's prompt to lose the concept there, as with the authors'
    `erase_from`. Several concepts are erased in one run: each sample draws one.
    """

    Config = ESDConfig
    paper: ClassVar[str] = ESDObjective.paper
    objective = ESDObjective
    handles_within = True
    uses_anchor = False
