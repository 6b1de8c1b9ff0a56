"""Few-shot erasing: textual inversion backwards, which moves the text encoder away from a few pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from sublimate.erasure.eraser import Changes
from sublimate.erasure.fine_tuning import FineTuningEraser
from sublimate.erasure.latent_bank import LatentBankConfig, few_latents
from sublimate.erasure.prompt_bank import PromptBank
from sublimate.erasure.request import Request, Templates
from sublimate.erasure.step_choice import StepChoice
from sublimate.erasure.targets import squared_error
from sublimate.erasure.templates import OBJECTS
from sublimate.erasure.text_student import TextBank, TextStudentConfig, TextStudentObjective
from sublimate.erasure.trajectories import noised
from sublimate.pipelines.model import Model
from sublimate.training.losses import denoising_loss
from sublimate.training.objective import Batch, Loss, Turn
from sublimate.training.plan import Plan
from sublimate.training.players import PlayerConfig
from sublimate.training.randomness import SampleRandom


class FewShotConfig(LatentBankConfig, TextStudentConfig):
    """Options of few-shot erasing; defaults are the authors' for Stable Diffusion 1.x: five epochs of four pictures.

    Attributes:
        adam_beta2, adam_epsilon: of Adam. The authors' weight decay of 1e-8 is far below rounding, and left out.
        images: pictures per concept that the model draws where `Concept.images` has none, asked for by the concept's
            name in the first template.
        zero_shot: train on uniform noise in [0, 1) in place of pictures' latents.
        max_drift: of the steps that drift by no more than this, that which forgets most is kept (`FewShotObjective`).
        held_out: noised samples that steps are measured on.

    `retain`, which weighs |y_phi - y|^2 on prompts of preserved concepts, is an addition. The others are
    `LatentBankConfig`'s and `TextStudentConfig`'s.
    """

    learning_rate: float = Field(default=1e-5, gt=0)
    max_train_steps: int = Field(default=10, ge=1)
    train_batch_size: int = Field(default=2, ge=1)
    adam_beta2: float = Field(default=0.98, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-6, gt=0)
    templates: Templates = OBJECTS
    retain: float = Field(default=0.0, ge=0)
    images: int = Field(default=4, ge=1)
    zero_shot: bool = False
    max_drift: float = Field(default=0.25, gt=0)
    held_out: int = Field(default=16, ge=1)

    def passes(self, step: int = 0) -> float:
        """Of the denoiser, without pictures; for a request with preserved concepts, if `retain` is set."""
        measuring = 3 * self.held_out / (self.train_batch_size * self.gradient_accumulation_steps)
        return 2 + 3 * (self.retain > 0) + measuring


class FewShotObjective(TextStudentObjective):
    """-E |y(x_t, t, T_phi(c)) - y*|^2 over few pictures, prompts c of the concept, noise and t; phi is what trains.

    y* is the network's own target (eps, v or a velocity). The loss has no lower bound and soon breaks the encoder for
    every prompt, so the number of steps is the only brake. After each step two numbers are measured at the pictures,
    under noise and at times that no step draws and that never change:

        gain   mean |y(x_t, t, T_phi(c)) - y*|^2, what training ascends
        drift  mean |y(x_t, t, T_phi(c_r)) - y(x_t, t, T(c_r))|^2 over neutral prompts c_r, in units of
               mean |y(x_t, t, T(c)) - y(x_t, t, T(""))|^2, which is what naming the concept does in the first place

    Neutral prompts are the empty one, the concept's with the anchor (or nothing) in its place, and the preserved
    concepts'. The step with the largest gain whose drift is at most `max_drift` is kept. The authors keep every epoch
    and choose by eye; this rule is an addition.
    """

    Config = FewShotConfig
    paper: ClassVar[str] = "2405.07288"
    config: FewShotConfig

    def __init__(self, model: Model, config: FewShotConfig, request: Request, *, seed: int = 0) -> None:
        super().__init__(model, config, request, seed=seed)
        self.pictures = few_latents(
            model,
            request.erase,
            config.templates,
            config,
            zero_shot=config.zero_shot,
            seed=seed,
            batch_size=config.train_batch_size,
        )
        phrases = [phrase for concept in request.erase for phrase in concept.phrases(config.templates)]
        anchored = sorted({phrase.anchored for phrase in phrases} - {""})
        kept = [[phrase.text for phrase in concept.phrases(config.templates)] for concept in request.preserve]
        groups = [[""], *([anchored] if anchored else []), *kept]
        self.neutral = TextBank(model, self.text, groups, self.guidance)
        self.held_out = self._hold_out()
        self.unit = self._unit()
        self.choice = StepChoice(self.player.trainable(), self.measure, config.max_drift)

    @staticmethod
    def optimiser(config: FewShotConfig) -> PlayerConfig:
        return PlayerConfig(
            learning_rate=config.learning_rate,
            adam_beta2=config.adam_beta2,
            adam_epsilon=config.adam_epsilon,
            adam_weight_decay=0.0,
        )

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        rows = self.erased.draw(batch.random)
        batch = batch.adding(rows=rows, **self._noised(batch.random, rows, batch.random.uniform(self.device)))
        return batch if self.kept is None else batch.adding(kept_rows=self.kept.draw(batch.random))

    def _noised(self, random: SampleRandom, rows: Tensor, u: Tensor) -> dict[str, Tensor]:
        x0, eps = self.pictures.draw(rows, random, self.device), random.normal(self.shape, self.device)
        x_t, t = noised(self.frozen.schedule, x0, eps, u)
        return {"x0": x0, "eps": eps, "x_t": x_t, "t": t}

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        return self.weighed(batch, {"erase": (-1.0, self.error(batch.tensors))})

    def error(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The denoising loss under the concept's prompts, averaged."""
        told = self.erased.condition(batch["rows"], batch["x_t"].device)
        return denoising_loss(self.student(batch["x_t"], batch["t"], told), batch["x0"], batch["eps"]).mean()

    def retain_error(self, batch: Batch, kept: PromptBank) -> Tensor:
        """|y_phi - y|^2 on preserved concepts' prompts, at the batch's own x_t."""
        return self.moved(cast(TextBank, kept), batch["kept_rows"], batch["x_t"], batch["t"]).mean()

    def _hold_out(self) -> list[dict[str, Tensor]]:
        """Noised pictures with prompts, times spread evenly, in parts of the training's batches."""
        n, size = self.config.held_out, self.config.train_batch_size
        random = SampleRandom(self.seed, 0, "held out", range(n))
        rows = self.erased.draw(random)
        u = (torch.arange(n, dtype=torch.float64, device=self.device) + 0.5) / n
        drawn = {"rows": rows, "neutral_rows": self.neutral.draw(random), **self._noised(random, rows, u)}
        return [{name: value[i : i + size] for name, value in drawn.items()} for i in range(0, n, size)]

    @torch.no_grad()
    def _unit(self) -> float:
        total = 0.0
        for part in self.held_out:
            x_t, t = part["x_t"], part["t"]
            told = self.frozen(x_t, t, self.erased.unmoved(part["rows"], x_t.device))
            untold = self.frozen(x_t, t, self.null.to(x_t.device).expand(len(x_t)))
            total += float(squared_error(told, untold).sum())
        if total == 0:
            raise ValueError("Naming the concept changes nothing that the model predicts: there is nothing to erase.")
        return total / self.config.held_out

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """(gain, drift) of the encoders as they are."""
        self.player.module.eval()
        gain = drift = 0.0
        for part in self.held_out:
            share = len(part["t"]) / self.config.held_out
            gain += share * float(self.error(part))
            drift += share * float(self.moved(self.neutral, part["neutral_rows"], part["x_t"], part["t"]).mean())
        return gain, drift / self.unit

    def after_step(self, step: int) -> None:
        self.choice.step()

    def state(self) -> dict[str, Tensor]:
        return self.choice.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.choice.load_state(state)

    def changes(self, model: Model) -> Changes:
        return Changes(values=self.text.keyed(self.choice.values), outcome=self.choice.outcome())


class FewShot(FineTuningEraser):
    """Erasing concepts with a few pictures (Fuchi and Takagi 2024)."""

    Config = FewShotConfig
    paper: ClassVar[str] = FewShotObjective.paper
    objective = FewShotObjective

    def plan(self, model: Model, request: Request) -> Plan:
        # What steps do is measured, from before the first.
        raise self.not_counted()

    uses_images = True
