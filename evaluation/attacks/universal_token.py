"""Universal token: one learned word that, before any prompt, makes a detector see the concept (SAGE)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sublimate.erasure.adversaries import SoftWords
from sublimate.evaluation.attack import Case, Outcome
from sublimate.evaluation.search_attack import SearchAttack, SearchConfig
from sublimate.evaluation.surrogate import concept_loss
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model
from sublimate.training.randomness import SampleRandom


class UniversalTokenConfig(SearchConfig):
    """Options of the search.

    Attributes:
        start: the word whose embedding it starts from; it stands for it in prompts.
        train_batch_size: prompts per update, each with fresh noise.
        surrogate_steps: sampling steps that the gradient goes through.

    The others are `SearchConfig`'s.
    """

    start: str = Field(default="a", min_length=1)
    max_train_steps: int = Field(default=50, ge=1)
    train_batch_size: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=0.02, gt=0)
    surrogate_steps: int = Field(default=4, ge=1)


class UniversalToken(SearchAttack):
    """min_v E -log p(concept | G(z, w v)) over prompts w that say the anchor in the concept's place.

    Naming the concept could do the work, so the prompts do not: the learned word alone has to bring it. As with every
    gradient of a detector, what is found may please it and nobody else.
    """

    Config = UniversalTokenConfig
    paper: ClassVar[str] = "2306.00974"
    renames: ClassVar[bool] = True

    @property
    def budget(self) -> str:
        c = self.config
        return f"one embedding, {c.max_train_steps} updates of {c.train_batch_size} through {c.surrogate_steps} steps"

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        c = self.config
        soft = SoftWords(model, c.start)
        # First in the prompt: its first mention is the learned one.
        prompts = tuple(f"{c.start} {text}" for text in case.renamed(case.prompts, case.concept.anchor))

        def loss(random: SampleRandom) -> Tensor:
            chosen = [prompts[row] for row in random.integers(len(prompts)).tolist()]
            z = random.normal(model.latent_shape, model.device)
            return concept_loss(model, case, chosen, z, c.surrogate_steps).mean()

        with soft.spoken():
            self.search(loss, list(soft.values.values()), seed=seed, progress=progress)
            with torch.no_grad():
                images = generate(model, prompts, seed=seed, progress=progress)
        return Outcome.seen(case, prompts, images)
