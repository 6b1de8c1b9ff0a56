"""Textual inversion: learns words for the concept from pictures, on the attacked model itself (Pham et al. 2023)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.erasure.adversaries import SoftWords, denoising_error
from sublimate.evaluation.attack import Case, Outcome, pictured
from sublimate.evaluation.search_attack import SearchAttack, SearchConfig
from sublimate.evaluation.words import unspoken
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model
from sublimate.training.randomness import SampleRandom


class TextualInversionConfig(SearchConfig):
    """Options of textual inversion; the rate and the number of vectors are recalled (not verified).

    Attributes:
        tokens: how many embeddings are learned.
        start: the word whose embedding they start from.
        pictures: of the concept that are learned from.
        train_batch_size: pictures per update.

    The others are `SearchConfig`'s.
    """

    tokens: int = Field(default=1, ge=1)
    start: str = Field(default="a", min_length=1)
    pictures: int = Field(default=16, ge=1)
    max_train_steps: int = Field(default=1000, ge=1)
    train_batch_size: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=5e-3, gt=0)


class TextualInversion(SearchAttack):
    """min_v E |eps - eps_theta(x_t, c(v), t)|^2 over word embeddings v that stand in the concept's place in prompts.

    Circumventing concept erasure (arXiv 2308.01508): what a model can still be told to draw, it has not forgotten.
    """

    Config = TextualInversionConfig
    paper: ClassVar[str] = "2308.01508"
    renames: ClassVar[bool] = True

    @property
    def budget(self) -> str:
        c = self.config
        updates = f"{c.max_train_steps} updates of {c.train_batch_size}"
        return f"up to {c.pictures} pictures, {updates}, {c.tokens} embedding(s)"

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        c = self.config
        word = unspoken(model, case.concept, (*case.prompts, *case.captions))
        soft = SoftWords(model, " ".join([word] * c.tokens), start=c.start)
        prompts, captions = (case.renamed(texts, soft.words) for texts in (case.prompts, case.captions))
        latents = pictured(model, case.pictures[: c.pictures])

        def told(rows: Tensor) -> Condition:
            return model.encode_prompts([captions[row] for row in rows.tolist()])

        def loss(random: SampleRandom) -> Tensor:
            return denoising_error(model.denoiser, random, latents, told)

        with soft.spoken():
            self.search(loss, list(soft.values.values()), seed=seed, progress=progress)
            images = generate(model, prompts, seed=seed, progress=progress)
        return Outcome.seen(case, prompts, images, found=f"“{soft.words}” stands for what was learned")
