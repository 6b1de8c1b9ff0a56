"""Adversarial prefix: words before a prompt, found by gradients through the attacked model alone (UnlearnDiffAtk)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.erasure.adversaries import SoftWords, denoising_error
from sublimate.evaluation.attack import Case, Outcome, pictured
from sublimate.evaluation.search_attack import SearchAttack, SearchConfig
from sublimate.evaluation.words import spellable
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model
from sublimate.training.randomness import SampleRandom


class AdversarialPrefixConfig(SearchConfig):
    """Options of the prefix search; the published attack searches one for every prompt, this one for all together.

    Attributes:
        tokens: words of the prefix.
        pictures: of the concept that judge a prefix.
        train_batch_size: pictures per update.

    The others are `SearchConfig`'s.
    """

    tokens: int = Field(default=3, ge=1)
    pictures: int = Field(default=16, ge=1)
    max_train_steps: int = Field(default=200, ge=1)
    train_batch_size: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=0.01, gt=0)


class AdversarialPrefix(SearchAttack):
    """min_w E |eps - eps_theta(x_t, w + c, t)|^2 over words w before the prompt c: the model is its own classifier.

    Words are whole tokens of letters that are not among the concept's names. The gradient is taken at the words
    nearest to continuous embeddings, which it then moves (as in P4D, arXiv 2309.06135, instead of the paper's relaxed
    choice of tokens); the words with the lowest loss on a fixed batch of noise are kept, the empty prefix among them.
    """

    Config = AdversarialPrefixConfig
    paper: ClassVar[str] = "2310.11868"

    @property
    def budget(self) -> str:
        c = self.config
        judged = f"each new prefix judged on {4 * c.train_batch_size} noises"
        updates = f"{c.max_train_steps} updates of {c.train_batch_size}, {judged}"
        return f"{c.tokens} words, up to {c.pictures} pictures, {updates}"

    def out_of_place(self, model: Model, case: Case) -> str:
        several = sum(name in model.components() for name in model.backbone.text_components) > 1
        if several:
            return "words are searched for a single text encoder, and the model has several"
        return super().out_of_place(model, case)

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        c = self.config
        vocabulary = spellable(model, case.concept)
        placeholder = " ".join([next(iter(vocabulary))] * c.tokens)
        soft = SoftWords(model, placeholder)
        (name, table), words = next(iter(soft.tables().items())), list(vocabulary)
        rows = table.detach()[torch.tensor(list(vocabulary.values()), device=table.device)].float()
        captions, latents = case.captions[: c.pictures], pictured(model, case.pictures[: c.pictures])

        def error(prefix: str, random: SampleRandom) -> Tensor:
            def told(chosen: Tensor) -> Condition:
                return model.encode_prompts([f"{prefix} {captions[row]}".strip() for row in chosen.tolist()])

            return denoising_error(model.denoiser, random, latents, told)

        def judged(prefix: str) -> float:
            with torch.no_grad():
                return float(error(prefix, SampleRandom(seed, 0, "judging a prefix", range(4 * c.train_batch_size))))

        free, losses = soft.values[name], {"": judged("")}

        def loss(random: SampleRandom) -> Tensor:
            nearest = torch.cdist(free.detach(), rows).argmin(dim=1)
            prefix = " ".join(words[i] for i in nearest.tolist())
            if prefix not in losses:
                losses[prefix] = judged(prefix)
            # Read as the nearest words, differentiated as what is free.
            soft.values[name] = free + (rows[nearest] - free).detach()
            with soft.spoken():
                return error(placeholder, random)

        self.search(loss, [free], seed=seed, progress=progress)
        best = min(losses, key=losses.__getitem__)
        prompts = tuple(f"{best} {prompt}".strip() for prompt in case.prompts)
        images = generate(model, prompts, seed=seed, progress=progress)
        return Outcome.seen(case, prompts, images, found=f"“{best}”" if best else "no prefix was better than none")
