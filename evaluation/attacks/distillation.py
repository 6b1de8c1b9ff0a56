"""Distillation: is the concept back in a one-step student of the attacked model?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from sublimate.evaluation.attack import Attack, Box, Case, Outcome
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model, open_model
from sublimate.training.config import Config, load_config
from sublimate.training.distill import DistillConfig, distill


class DistillationConfig(Config):
    """Options of the distillation.

    Attributes:
        config: a run of `configs/distill/` by name, or a file: how the student is trained; its model is replaced.
        overrides: `key.sub=value` changes to it.
    """

    config: str = "demo"
    overrides: tuple[str, ...] = Field(default=())


class Distillation(Attack):
    """Trains a student that starts as the attacked model; the run says whether prompts name the concept."""

    Config = DistillationConfig
    paper: ClassVar[str] = "2409.11219"
    box: ClassVar[Box] = "persistence"
    every_level: ClassVar[bool] = True
    differentiates: ClassVar[bool] = True

    @property
    def budget(self) -> str:
        run = self._run(Path())
        return f"{run.method}, {run.trainer.max_train_steps} updates of {run.trainer.train_batch_size}"

    def depends_on(self) -> dict[str, Any]:
        return self._run(Path()).resolved().model_dump(mode="json")

    def _run(self, folder: Path) -> DistillConfig:
        changes = [*self.config.overrides, f"trainer.output_dir={folder}"]
        return load_config(DistillConfig, self.config.config, changes)

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="sublimate-") as folder, torch.random.fork_rng(devices=[]):
            config = self._run(Path(folder))
            config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"seed": seed})})
            student = open_model(distill(config, model, progress=progress)).to(model.device)
        return Outcome.seen(case, case.prompts, generate(student, case.prompts, seed=seed, progress=progress))
