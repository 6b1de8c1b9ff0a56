"""What attacks share that train a model further: an adapter on pictures with captions, and the rate as it learns."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.erasure.adversaries import denoising_error, minimise
from sublimate.evaluation.attack import Attack, Box, Case, Outcome, pictured
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model
from sublimate.training.config import Config
from sublimate.training.players import PlayerConfig, make_player
from sublimate.training.randomness import SampleRandom, key


class TuningConfig(Config):
    """Options of further training.

    Attributes:
        pictures: that are trained on.
        steps: numbers of updates after which the concept's prompts are drawn, ascending.
        train_batch_size: pictures per update.
        tuned: the LoRA (or full copy) that trains.
    """

    pictures: int = Field(default=20, ge=1)
    steps: tuple[int, ...] = (25, 50, 100, 200)
    train_batch_size: int = Field(default=8, ge=1)
    tuned: PlayerConfig = PlayerConfig(kind="lora", rank=8, learning_rate=3e-4, adam_weight_decay=0.0)

    @field_validator("steps")
    @classmethod
    def _ascending(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if not steps or list(steps) != sorted(set(steps)) or steps[0] < 1:
            raise ValueError(f"Steps must be positive and ascending, but are {list(steps)}.")
        return steps


class TuningAttack(Attack):
    """Trains a copy of the model with the diffusion loss, and draws the concept's prompts on the way."""

    Config = TuningConfig
    box: ClassVar[Box] = "persistence"
    every_level: ClassVar[bool] = True
    differentiates: ClassVar[bool] = True

    @property
    def budget(self) -> str:
        c = self.config
        return f"up to {c.pictures} pictures, {c.steps[-1]} updates of {c.train_batch_size}"

    @abstractmethod
    def lessons(self, case: Case, seed: int) -> tuple[Sequence[str], Tensor]:
        """Captions, and as many pictures (N, 3, H, W) in [0, 1]."""

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        c = self.config
        captions, pictures = self.lessons(case, seed)
        latents = pictured(model, pictures)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, self.name()))  # an adapter starts at random numbers
            player = make_player(model.denoiser, c.tuned)
        tuned = copy.copy(model)
        tuned.denoiser = player.module  # type: ignore[assignment]

        def told(rows: Tensor) -> Condition:
            return model.encode_prompts([captions[row] for row in rows.tolist()])

        def loss(random: SampleRandom) -> Tensor:
            return denoising_error(tuned.denoiser, random, latents, told)

        # The last point of the curve is the outcome; the first is the model as it was.
        outcome = Outcome.seen(case, case.prompts, generate(model, case.prompts, seed=seed, progress=progress))
        curve, done, optimizer = [(0, outcome.rate)], 0, player.optimizer()
        for steps in c.steps:
            player.set_trainable(True)
            minimise(
                loss,
                list(player.trainable().values()),
                steps=steps - done,
                start=done,
                optimizer=optimizer,
                learning_rate=c.tuned.learning_rate,
                batch_size=c.train_batch_size,
                seed=seed,
                name=self.name(),
                progress=progress,
            )
            player.set_trainable(False)
            images, done = generate(tuned, case.prompts, seed=seed, progress=progress), steps
            outcome = Outcome.seen(case, case.prompts, images)
            curve.append((steps, outcome.rate))
        return Outcome(outcome.prompts, outcome.images, outcome.hits, curve=tuple(curve))
