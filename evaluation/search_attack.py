"""What attacks share that search a few embeddings by gradient: the options of Adam, and the search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from sublimate.erasure.adversaries import minimise
from sublimate.evaluation.attack import Attack, Box
from sublimate.training.config import Config
from sublimate.training.randomness import SampleRandom


class SearchConfig(Config):
    """Options of a search.

    Attributes:
        max_train_steps: updates.
        train_batch_size: samples per update.
        learning_rate: of Adam.
    """

    max_train_steps: int = Field(default=200, ge=1)
    train_batch_size: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=0.01, gt=0)


class SearchAttack(Attack):
    """Follows gradients through the attacked model to embeddings that bring the concept back."""

    box: ClassVar[Box] = "white box"
    every_level: ClassVar[bool] = True
    differentiates: ClassVar[bool] = True
    searches_words: ClassVar[bool] = True

    def search(
        self, loss: Callable[[SampleRandom], Tensor], embeddings: Sequence[Tensor], *, seed: int, progress: bool
    ) -> None:
        """Moves embeddings against a loss, which gets each update's random numbers, one stream per sample."""
        c = self.config
        minimise(
            loss,
            embeddings,
            steps=c.max_train_steps,
            learning_rate=c.learning_rate,
            batch_size=c.train_batch_size,
            seed=seed,
            name=self.name(),
            progress=progress,
        )
