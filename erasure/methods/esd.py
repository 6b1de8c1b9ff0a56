"""ESD: fine-tunes the denoiser to answer a concept with guidance away from it."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.erasure import keep, targets
from sublimate.erasure.eraser import Changes, Eraser
from sublimate.erasure.fine_tuning import (
    FineTuningConfig,
    fine_tune,
    make_student,
    trained_values,
)
from sublimate.erasure.prompt_bank import concept_bank
from sublimate.erasure.request import Request, Templates
from sublimate.erasure.trajectories import rollout
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.model import Model
from sublimate.training.objective import Artefact, Batch, Loss, SoloObjective, Turn


class ESDConfig(FineTuningConfig):
    """Options of ESD; the defaults are the paper's ESD-x, the keep terms are additions that start at zero or with
    `preserve` alone.

    Attributes:
        weights: "x" for what is asked for by name (styles, persons), "u" for what must go whatever the prompt says.
        eta: strength of the negative guidance as the paper counts it. The authors' rewrite of 2025 counts one more:
            its default 2 is 1 here.
        start_guidance: guidance of the sampling that makes x_t; 1 is none.
        sampling_steps: DDIM steps of a whole sampling; it stops at a random one.
        trajectory: who samples x_t: the "student" as it is (the paper) or the "frozen" network (the rewrite).
        templates: prompts with `{}` that concepts, erased and preserved, are put in; the paper uses bare names.
            `Concept.prompts` are used as well. `Concept.anchor` is not: ESD leads away from a concept, not to another.
        space: the quantity whose squared error is minimised; see `erasure/targets.py` for what it weights.
        retain: weight of |student - frozen|^2 on the preserved concepts' prompts, at x_t sampled for them.
        null_pin: weight of |student - frozen|^2 without text, at the x_t of the erased concept.
        l1: weight of the mean absolute change of the trained weights.
    """

    eta: float = Field(default=1.0, ge=0)
    start_guidance: float = Field(default=3.0, ge=0)
    sampling_steps: int = Field(default=50, ge=1)
    trajectory: Literal["student", "frozen"] = "student"
    templates: Templates = ("{}",)
    space: targets.Space = "output"
    retain: float = Field(default=1.0, ge=0)
    null_pin: float = Field(default=0.0, ge=0)
    l1: float = Field(default=0.0, ge=0)

    def passes(self, step: int = 0) -> float:
        """For a request with preserved concepts (if `retain` is set) and without `within`, which adds 1."""
        sampling = (self.sampling_steps - 1) / 2 * (1 if self.start_guidance == 1 else 2)
        return sampling + 2 + 3 + (3 if self.null_pin else 0) + (sampling + 1 + 3 if self.retain else 0)


class ESD(Eraser):
    """Erased Stable Diffusion (Gandikota et al. 2023).

    With `within`, the student is trained under the context's prompt to lose the concept there, as with the authors'
    `erase_from`. Several concepts are erased in one run: each sample draws one.
    """

    Config = ESDConfig
    paper: ClassVar[str] = "2303.07345"
    handles_within = True
    uses_anchor = False

    def solve(
        self, model: Model, request: Request, *, seed: int, detector: Detector | None, progress: bool
    ) -> Changes:
        objective = ESDObjective(model, self.config, request)
        fine_tune(model, objective, request, self.config, seed=seed, progress=progress)
        return Changes(values=trained_values(model, objective.player))


class ESDObjective(SoloObjective):
    """E |y_theta(x_t, c, t) - [y*(x_t, t) - eta (y*(x_t, c, t) - y*(x_t, t))]|^2, * being the frozen network.

    Args:
        model: where training starts; stays as it is.
        config: options.
        request: concepts to erase, to preserve, and the context.

    Raises:
        ValueError: when the model has no text, is not in float32, or has no such weights.
    """

    Config = ESDConfig
    paper: ClassVar[str] = ESD.paper

    def __init__(self, model: Model, config: ESDConfig, request: Request) -> None:
        self.null = model.null_condition()
        if not self.null.text_keys:
            raise ValueError(f"{model.source} knows no prompts, so ESD has nothing to erase by name.")
        super().__init__(model, config, "student", make_student(model, config))
        self.frozen, self.shape = model.denoiser, model.latent_shape
        self.originals = {n: p.detach().clone() for n, p in self.player.trainable().items()}
        self.erased = concept_bank(model, request.erase, config.templates)
        self.context = None if request.within is None else concept_bank(model, [request.within], config.templates)
        keeps = bool(request.preserve) and config.retain > 0
        self.kept = concept_bank(model, request.preserve, config.templates) if keeps else None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    @property
    def student(self) -> Denoiser:
        """The network that trains."""
        module = self.player.module
        if not isinstance(module, Denoiser):
            raise TypeError(f"The student must be a Denoiser, not a {type(module).__name__}.")
        return module

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return next(self.student.parameters()).device

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        config, device, null = self.config, self.device, self.null.to(self.device)
        rows = self.erased.draw(batch.random)
        concept = context = self.erased.condition(rows, device)
        if self.context is not None:
            rows = self.context.draw(batch.random)
            context = self.context.condition(rows, device)
        x_t, t = self._sample(batch, context, null)
        y_null, y_concept = self.frozen(x_t, t, null), self.frozen(x_t, t, concept)
        if self.context is None:
            target = targets.negative_guidance(y_null, y_concept, config.eta)
        else:
            target = targets.within(self.frozen(x_t, t, context), y_concept, y_null, config.eta)
        batch = batch.adding(rows=rows, x_t=x_t, t=t, target=target.output, null=y_null.output)
        if self.kept is not None:
            kept_rows = self.kept.draw(batch.random)
            kept_x_t, kept_t = self._sample(batch, self.kept.condition(kept_rows, device), null)
            batch = batch.adding(kept_rows=kept_rows, kept_x_t=kept_x_t, kept_t=kept_t)
        return batch

    def _sample(self, batch: Batch, condition: Condition, null: Condition) -> tuple[Tensor, Tensor]:
        c = self.config
        z = batch.random.normal(self.shape, self.device)
        stops = batch.random.integers(c.sampling_steps)
        sampler = self.student if c.trajectory == "student" else self.frozen
        return rollout(sampler, z, condition, null, stops, steps=c.sampling_steps, guidance_scale=c.start_guidance)

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        config, x_t, t = self.config, batch["x_t"], batch["t"]
        bank = self.erased if self.context is None else self.context
        prediction = self.student(x_t, t, bank.condition(batch["rows"], x_t.device))
        target = replace(prediction, output=batch["target"])
        terms = {"erase": targets.squared_error(prediction, target, config.space).mean()}
        total = terms["erase"]
        if self.kept is not None:
            kept = self.kept.condition(batch["kept_rows"], x_t.device)
            error = keep.frozen_error(
                self.student, self.frozen, batch["kept_x_t"], batch["kept_t"], kept, config.space
            )
            terms["retain"] = error.mean()
            total = total + config.retain * terms["retain"]
        if config.null_pin > 0:
            free = self.student(x_t, t, self.null.to(x_t.device))
            pinned = replace(free, output=batch["null"])
            terms["null"] = targets.squared_error(free, pinned, config.space).mean()
            total = total + config.null_pin * terms["null"]
        if config.l1 > 0:
            trained = self.player.trainable()
            originals = {name: value.to(x_t.device) for name, value in self.originals.items()}
            terms["l1"] = keep.l1_drift(trained, originals)
            total = total + config.l1 * terms["l1"]
        return Loss(total, terms)

    def exports(self) -> Artefact:
        return Artefact("weights", self.student)
