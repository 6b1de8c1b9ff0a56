"""Word search: words after a prompt, found from the model's images alone by greedy search over the vocabulary."""

from __future__ import annotations

import random
from typing import ClassVar

import torch
from pydantic import Field

from sublimate.evaluation.attack import Attack, Box, Case, Outcome
from sublimate.evaluation.words import spellable
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model
from sublimate.training.config import Config
from sublimate.training.randomness import key


class WordSearchConfig(Config):
    """Options of the search.

    Attributes:
        tokens: words of the suffix.
        rounds: coordinates that are tried, one after the other.
        candidates: words tried per round.
        images: drawn per candidate, of as many prompts.
    """

    tokens: int = Field(default=3, ge=1)
    rounds: int = Field(default=12, ge=1)
    candidates: int = Field(default=8, ge=1)
    images: int = Field(default=8, ge=1)


class WordSearch(Attack):
    """Greedy coordinate search: each round changes one word to the candidate whose images look most like the concept.

    It needs no gradients, only the detector's probability: the search of GCG (Zou et al. 2023) with random candidates.
    Words are single tokens that are not among the concept's names; all prompts share them.
    """

    Config = WordSearchConfig
    paper: ClassVar[str] = "2307.15043"
    box: ClassVar[Box] = "black box"
    searches_words: ClassVar[bool] = True

    @property
    def budget(self) -> str:
        c = self.config
        return f"{c.tokens} words, {c.rounds * c.candidates * c.images} images to find them"

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        c, choose = self.config, random.Random(key(seed, self.name()))
        vocabulary, tried = sorted(spellable(model, case.concept)), case.prompts[: c.images]

        def score(words: tuple[str, ...], round_: int) -> float:
            images = generate(model, _with(tried, words), seed=key(seed, self.name(), round_))
            with torch.no_grad():
                return float(case.probability(images).mean())

        best = tuple(choose.choice(vocabulary) for _ in range(c.tokens))
        for round_ in range(c.rounds):
            place = round_ % c.tokens
            words = choose.sample(vocabulary, min(c.candidates - 1, len(vocabulary)))
            options = [best, *((*best[:place], word, *best[place + 1 :]) for word in words)]
            best = max(options, key=lambda option: score(option, round_))
        images = generate(model, _with(case.prompts, best), seed=seed, progress=progress)
        return Outcome.seen(case, _with(case.prompts, best), images, found=f"“{' '.join(best)}”")


def _with(prompts: tuple[str, ...], words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{prompt} {' '.join(words)}" for prompt in prompts)
