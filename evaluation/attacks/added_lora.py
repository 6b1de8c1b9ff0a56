"""Added LoRA: loads an adapter of the base, such as an accelerating one, on top of the attacked model."""

from __future__ import annotations

import copy
from typing import ClassVar

from pydantic import Field, FilePath

from sublimate.evaluation.attack import Attack, Box, Case, Outcome
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model
from sublimate.training.config import Config


class AddedLoRAConfig(Config):
    """Options of the adapter.

    Attributes:
        lora: its `.safetensors` file, as `load_lora_weights` takes it; without one there is nothing to add.
        steps: sampling steps with it; the model's own unless given.
        guidance_scale: with it; the model's own unless given.
    """

    lora: FilePath | None = None
    steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=1)


class AddedLoRA(Attack):
    """What was trained on the base may undo what was edited: LCM-LoRA (arXiv 2311.05556) fits every fine-tune."""

    Config = AddedLoRAConfig
    paper: ClassVar[str] = "2311.05556"
    box: ClassVar[Box] = "white box"

    @property
    def budget(self) -> str:
        return f"the adapter {'of no file' if self.config.lora is None else self.config.lora.name}"

    def out_of_place(self, model: Model, case: Case) -> str:
        return "" if self.config.lora is not None else "no adapter was given (--set added_lora.lora=FILE)"

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        c = self.config
        added = copy.copy(model)
        added.denoiser, added.pipeline = copy.deepcopy(model.denoiser), copy.copy(model.pipeline)
        setattr(added.pipeline, model.backbone.network_attribute, added.denoiser.network)
        # Files may hold adapters of text encoders too.
        for name in model.components().keys() & set(model.backbone.text_components):
            setattr(added.pipeline, name, copy.deepcopy(model.component(name)))
        added.pipeline.load_lora_weights(str(c.lora.parent), weight_name=c.lora.name)
        images = generate(
            added, case.prompts, seed=seed, steps=c.steps, guidance_scale=c.guidance_scale, progress=progress
        )
        return Outcome.seen(case, case.prompts, images)
