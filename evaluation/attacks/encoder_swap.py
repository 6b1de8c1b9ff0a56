"""Encoder swap: puts the base's text encoders in the place of the attacked model's."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch

from sublimate.evaluation.attack import Attack, Box, Case, Outcome
from sublimate.pipelines.edit_attachment import attached_kinds
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model
from sublimate.training.config import Config


class EncoderSwap(Attack):
    """What was erased in a text encoder is undone by whoever loads another one."""

    Config = Config
    paper: ClassVar[str] = "2405.07288"
    box: ClassVar[Box] = "white box"

    @property
    def budget(self) -> str:
        return "one image per prompt"

    def out_of_place(self, model: Model, case: Case) -> str:
        if model is case.base:
            return ""
        ours, theirs = model.components(), case.base.components()
        names = [name for name in model.backbone.text_components if name in ours]
        same = all(
            torch.equal(p, q)
            for name in names
            for p, q in zip(ours[name].parameters(), theirs[name].parameters(), strict=True)
        ) and not any(attached_kinds(ours[name]) for name in names)
        return "the text encoders are the base's" if same else ""

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        swapped = copy.copy(model)
        swapped.pipeline = copy.copy(model.pipeline)
        for name in model.backbone.text_components:
            setattr(swapped.pipeline, name, getattr(case.base.pipeline, name, None))
        return Outcome.seen(case, case.prompts, generate(swapped, case.prompts, seed=seed, progress=progress))
