"""What erasers share that train where the model itself goes: x_t on its way to images of the concept."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.erasure import keep, targets
from sublimate.erasure.fine_tuning import StudentConfig, StudentObjective
from sublimate.erasure.prompt_bank import PromptBank
from sublimate.erasure.request import Request
from sublimate.erasure.trajectories import rollout
from sublimate.pipelines.model import Model
from sublimate.training.objective import Batch, Turn
from sublimate.training.plan import Loop
from sublimate.training.randomness import SampleRandom


class RolloutConfig(StudentConfig):
    """Options of training along the model's own sampling.

    Attributes:
        start_guidance: guidance of the sampling that makes x_t; 1 is none.
        sampling_steps: DDIM steps of a whole sampling; x_t is what it has become after a random number of them.
        updates_per_rollout: optimiser steps per training step: as many x_t are taken from one sampling, each from its
            own part of the way, instead of sampling afresh for each. Divides `sampling_steps`.
        trajectory: who samples x_t: the "student" as it is, or the "frozen" network.
        space: the quantity whose squared error is minimised; see `erasure/targets.py` for what it weights.
    """

    start_guidance: float = Field(default=3.0, ge=0)
    sampling_steps: int = Field(default=50, ge=1)
    updates_per_rollout: int = Field(default=1, ge=1)
    trajectory: Literal["student", "frozen"] = "student"
    space: targets.Space = "output"

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.sampling_steps % self.updates_per_rollout:
            raise ValueError(
                f"updates_per_rollout = {self.updates_per_rollout} does not divide sampling_steps = "
                f"{self.sampling_steps}: every update takes its x_t from a part of the same length."
            )
        return self

    def brief(self) -> Self:
        return self.model_copy(update={"sampling_steps": self.updates_per_rollout})

    @property
    def rollout_passes(self) -> float:
        """Network passes of one sampling, on average: it ends with the last x_t that is taken."""
        part = self.sampling_steps // self.updates_per_rollout
        return (self.sampling_steps - part + (part - 1) / 2) * self.guided_passes(self.start_guidance != 1)

    def passes(self, step: int = 0) -> float:
        """For a request with preserved concepts, if `retain` is set."""
        updates = self.updates_per_rollout * (self.update_passes + (1 + 3 if self.retain else 0))
        return self.rollout_passes * (2 if self.retain else 1) + updates

    @property
    @abstractmethod
    def update_passes(self) -> float:
        """Network passes of one update without `retain`, counted as in `passes`."""


class RolloutObjective(StudentObjective):
    """Trains the student at x_t of its own (or the frozen network's) guided sampling of the concepts.

    A training step samples once and makes `updates_per_rollout` updates, one per turn. Each sample draws one concept.
    """

    config: RolloutConfig

    def __init__(self, model: Model, config: RolloutConfig, request: Request, *, seed: int = 0) -> None:
        super().__init__(model, config, request, seed=seed)
        self.grid = model.schedule.grid(config.sampling_steps, model.backbone.grid_spacing)
        self._sampled: dict[str, Tensor] = {}

    def turns(self, step: int) -> tuple[Turn, ...]:
        if self.config.updates_per_rollout == 1:
            return super().turns(step)
        # The first samples for all; after it they are alike.
        names = [f"{self.name}{i}" for i in range(self.config.updates_per_rollout)]
        return tuple(Turn(name, (self.name,), names[1] if i > 1 else None) for i, name in enumerate(names))

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        place = self.turns(step).index(turn)
        if place == 0:
            self._sampled = self.sample(batch)
        # (updates, batch, ...): x_t and t of all updates; rows are the same for all.
        mine = {name: v if name.endswith("rows") else v[place] for name, v in self._sampled.items()}
        return self.aim(batch.adding(**mine))

    def sample(self, batch: Batch) -> dict[str, Tensor]:
        """Prompts of the batch as `rows` (batch,) of a bank, and their `x_t` and `t` (updates, batch, ...)."""
        rows = self.erased.draw(batch.random)
        return {"rows": rows, **self.roll(batch, self.erased, rows), **self.sample_kept(batch)}

    def sample_kept(self, batch: Batch) -> dict[str, Tensor]:
        """The same for preserved concepts, under names that start with `kept_`."""
        if self.kept is None:
            return {}
        rows = self.kept.draw(batch.random)
        return {f"kept_{k}": v for k, v in {"rows": rows, **self.roll(batch, self.kept, rows)}.items()}

    @property
    def sampler(self) -> Denoiser:
        """Who samples x_t."""
        return self.student if self.config.trajectory == "student" else self.frozen

    def roll(self, batch: Batch, bank: PromptBank, rows: Tensor) -> dict[str, Tensor]:
        """x_t and t of one sampling per sample, at as many places as there are updates."""
        c = self.config
        z = batch.random.normal(self.shape, self.device)
        if c.updates_per_rollout == 1:
            stops = batch.random.integers(c.sampling_steps)[None]
        else:
            part = c.sampling_steps // c.updates_per_rollout
            stops = torch.stack([i * part + batch.random.integers(part) for i in range(c.updates_per_rollout)])
        told, null = bank.condition(rows, self.device), self.null.to(self.device)
        x_t, t = rollout(self.sampler, z, told, null, stops, self.grid, guidance_scale=c.start_guidance)
        return {"x_t": x_t, "t": t}

    def loop(self, config: Any) -> Loop:
        c = self.config
        guided = c.guided_passes(c.start_guidance != 1)
        return Loop(self.one_pass, (config.passes() - c.passes()) / guided)

    def one_pass(self) -> None:
        """Takes one step of a sampling, of as many samples as an update has."""
        size = self.config.train_batch_size * self.config.gradient_accumulation_steps
        random = SampleRandom(self.seed, 0, "one pass", range(size))
        told = self.erased.condition(self.erased.draw(random), self.device)
        z, once = random.normal(self.shape, self.device), torch.ones(len(random), dtype=torch.int64)
        null, scale = self.null.to(self.device), self.config.start_guidance
        rollout(self.sampler, z, told, null, once, self.sampler.schedule.grid(2), guidance_scale=scale)

    @abstractmethod
    def aim(self, batch: Batch) -> Batch:
        """Adds what the student shall predict at the batch's x_t, without gradients."""

    def asked(self, batch: Batch, bank: PromptBank | None = None) -> Condition:
        """The prompts of the batch's rows in a bank, the erased concepts' unless another is given."""
        return (bank or self.erased).condition(batch["rows"], batch["x_t"].device)

    def retain_error(self, batch: Batch, kept: PromptBank) -> Tensor:
        """|student - frozen|^2 on the preserved concepts' prompts, at x_t sampled for them."""
        x_t, t = batch["kept_x_t"], batch["kept_t"]
        told = kept.condition(batch["kept_rows"], x_t.device)
        return keep.frozen_error(self.student, self.frozen, x_t, t, told, self.config.space).mean()
