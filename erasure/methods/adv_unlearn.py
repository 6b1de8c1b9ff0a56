"""AdvUnlearn: erases from the text encoder what an adversarial prefix of the prompt would bring back."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self, cast

import torch
from pydantic import Field
from torch import Tensor

from sublimate.diffusion.predictions import Prediction
from sublimate.erasure import targets
from sublimate.erasure.adversaries import SoftWords
from sublimate.erasure.fine_tuning import FineTuningEraser
from sublimate.erasure.prompt_bank import PromptBank, with_guidance
from sublimate.erasure.request import Request
from sublimate.erasure.rollouts import RolloutConfig, RolloutObjective
from sublimate.erasure.text_student import TextBank, TextRule, TextStudentConfig, TextStudentObjective
from sublimate.pipelines.model import Model
from sublimate.training.objective import Batch, Loss, Turn

_PLACEHOLDER = "a"
_PREFIX = "prefix_"


class AdvUnlearnConfig(RolloutConfig, TextStudentConfig):
    """Options of AdvUnlearn; defaults are the authors' for nudity.

    Attributes:
        trajectory: x_t is sampled as the student says.
        eta: strength of the negative guidance, as in ESD.
        warmup_steps: training steps without adversary.
        adversary_tokens: words of the prefix.
        adversary_steps: its updates for each of the student's.
        adversary_rate: how far each moves every number of its embedding.

    `retain` weighs |y_phi - y|^2 on prompts of preserved concepts, the authors' gamma. The others are
    `RolloutConfig`'s and `TextStudentConfig`'s.
    """

    weights: TextRule = "all"
    trajectory: Literal["student"] = "student"
    retain: float = Field(default=0.3, ge=0)
    eta: float = Field(default=1.0, ge=0)
    warmup_steps: int = Field(default=200, ge=0)
    adversary_tokens: int = Field(default=1, ge=1)
    adversary_steps: int = Field(default=30, ge=0)
    adversary_rate: float = Field(default=1e-3, gt=0)

    def brief(self) -> Self:
        few = {"adversary_steps": min(1, self.adversary_steps), "warmup_steps": 0}
        return super().brief().model_copy(update=few)

    @property
    def update_passes(self) -> float:
        """After the warm-up."""
        return 2 + 2 * self.adversary_steps + 3


class AdvUnlearnObjective(TextStudentObjective, RolloutObjective):
    """E |y(x_t, T_phi(p* + c)) - [y* - eta (y*_c - y*)]|^2 + retain E |y(x_t, T_phi(c_r)) - y*_cr|^2.

    p* = argmin_p |y(x_t, T_phi(p + c)) - y*_c|^2 are word embeddings before the prompt, found for each sample by steps
    along the sign of the gradient from those of a plain word. y is the frozen denoiser, T_phi the encoders that train;
    * marks what it says when told by the encoders as they were.
    """

    Config = AdvUnlearnConfig
    paper: ClassVar[str] = "2405.15234"
    config: AdvUnlearnConfig

    def __init__(self, model: Model, config: AdvUnlearnConfig, request: Request, *, seed: int = 0) -> None:
        super().__init__(model, config, request, seed=seed)
        words = " ".join([_PLACEHOLDER] * config.adversary_tokens)
        self.soft = SoftWords(model, words, encoders=self.text.encoders)
        self.plain = {name: value.detach() for name, value in self.soft.values.items()}
        # Refused now rather than at the first attack: a prompt that is too long with a prefix.
        model.encode_prompts([f"{words} {prompt}" for prompt in self.erased.prompts])

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        batch = super().prepare(turn, batch, step)
        if step < self.config.warmup_steps or not self.config.adversary_steps:
            return batch
        return batch.adding(**{f"{_PREFIX}{name}": value for name, value in self.attack(batch).items()})

    def aim(self, batch: Batch) -> Batch:
        x_t, t = batch["x_t"], batch["t"]
        y_null = self.frozen(x_t, t, self.null.to(x_t.device))
        y_concept = self.frozen(x_t, t, self.erased.unmoved(batch["rows"], x_t.device))
        target = targets.negative_guidance(y_null, y_concept, self.config.eta)
        return batch.adding(target=target.output, concept=y_concept.output)

    def attack(self, batch: Batch) -> dict[str, Tensor]:
        """The prefix of each sample that brings its concept back, by text encoder, (batch, tokens, width)."""
        found = {n: v.to(self.device).expand(len(batch["t"]), -1, -1).clone() for n, v in self.plain.items()}
        for _ in range(self.config.adversary_steps):
            found = {name: value.requires_grad_(True) for name, value in found.items()}
            with torch.enable_grad():
                error = (self.attacked(batch, found).output - batch["concept"]).square().sum()
            gradients = torch.autograd.grad(error, list(found.values()))
            rate = self.config.adversary_rate
            found = {n: v.detach() - rate * g.sign() for (n, v), g in zip(found.items(), gradients, strict=True)}
        return found

    def attacked(self, batch: Batch, prefix: dict[str, Tensor]) -> Prediction:
        """What the student says of prompts that start with these embeddings."""
        prompts = [f"{self.soft.words} {self.erased.prompts[row]}" for row in batch["rows"].tolist()]
        self.soft.values = prefix
        with self.soft.spoken():
            told = with_guidance(self.text.encode_prompts(prompts), self.guidance)
        return self.student(batch["x_t"], batch["t"], told.to(batch["x_t"].device))

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        x_t, t = batch["x_t"], batch["t"]
        prefix = {n.removeprefix(_PREFIX): v for n, v in batch.tensors.items() if n.startswith(_PREFIX)}
        prediction = self.attacked(batch, prefix) if prefix else self.student(x_t, t, self.asked(batch))
        target = replace(prediction, output=batch["target"])
        error = targets.squared_error(prediction, target, self.config.space).mean()
        return self.weighed(batch, {"erase": (1.0, error)})

    def retain_error(self, batch: Batch, kept: PromptBank) -> Tensor:
        """|y(T_phi(c_r)) - y(T(c_r))|^2 at x_t sampled for preserved concepts."""
        return self.moved(cast(TextBank, kept), batch["kept_rows"], batch["kept_x_t"], batch["kept_t"]).mean()


class AdvUnlearn(FineTuningEraser):
    """Adversarial training of the text encoder against ESD's target (Zhang et al. 2024)."""

    Config = AdvUnlearnConfig
    paper: ClassVar[str] = AdvUnlearnObjective.paper
    objective = AdvUnlearnObjective
    uses_anchor = False
