"""What fine-tuning erasers share: options of the run, the student they start from, and running the trainer."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.erasure.eraser import Changes, Eraser
from sublimate.erasure.prompt_bank import PromptBank, concept_groups, with_guidance
from sublimate.erasure.request import Concept, Request, Templates
from sublimate.erasure.trained_weights import denoiser_changes, denoiser_player, full_keys
from sublimate.erasure.weights import Rule
from sublimate.pipelines.attention import Kernel, attention_chosen
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.memory_format import channels_last
from sublimate.pipelines.model import Model
from sublimate.training.checkpoints import fingerprint
from sublimate.training.config import Config
from sublimate.training.data import Source
from sublimate.training.objective import Artefact, Batch, Loss, Objective, ObjectiveConfig, SoloObjective
from sublimate.training.plan import WRITTEN_OUT, Loop, Plan, plan
from sublimate.training.players import Player
from sublimate.training.precision import check_precision
from sublimate.training.randomness import SampleRandom
from sublimate.training.together import accelerator
from sublimate.training.trainer import Interrupted, Trainer, TrainerConfig


class RunConfig(Config):
    """Options of an eraser's run, named as the trainer's.

    Attributes:
        max_train_steps: optimiser steps.
        train_batch_size: samples per micro-batch.
        gradient_accumulation_steps: micro-batches per step.
        output_dir: where the log and checkpoints go, which makes the run resumable; None keeps neither.
        checkpointing_steps: steps between checkpoints; None saves only when stopped early.
        max_grad_norm: gradients of a larger norm are shortened to it.
    """

    max_train_steps: int = Field(default=1000, ge=1)
    train_batch_size: int = Field(default=1, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    output_dir: Path | None = None
    checkpointing_steps: int | None = Field(default=None, ge=1)
    max_grad_norm: float = Field(default=10.0, gt=0)


class StudentConfig(RunConfig, ObjectiveConfig, ABC):
    """Options of a fine-tuning eraser, whatever its student is.

    Attributes:
        learning_rate: of Adam, without weight decay, which would move weights that nothing asks to move.
        templates: prompts with `{}` that concepts, erased and preserved, are put in; `Concept.prompts` are used too.
        retain: weight of the term that holds preserved concepts; without any there is none.
        guidance_scale: what student and targets are told where the network reads the guidance as an input (FLUX.1
            [dev]); None is the model's own, with which it is drawn. Other networks refuse it.
        attention: the attention kernel (`sublimate.pipelines.attention`); None leaves the model's own.
        channels_last: store convolutions with channels last: faster for UNets in half precision on a GPU.
        mixed_precision: "bf16" runs networks under autocast; weights and losses stay float32.
        gradient_checkpointing: recompute activations in the backward pass to save memory.

    The others are `RunConfig`'s.
    """

    learning_rate: float = Field(default=1e-5, gt=0)
    templates: Templates = ("{}",)
    retain: float = Field(default=1.0, ge=0)
    guidance_scale: float | None = Field(default=None, ge=0)
    attention: Kernel | None = None
    channels_last: bool = False
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False

    def brief(self) -> Self:
        """These options with every loop of like steps as short as it can be: a step then keeps as much, and is soon
        over."""
        return self


class FineTuningConfig(StudentConfig, ABC):
    """Options of an eraser that trains the denoiser.

    Attributes:
        weights: which weights train; see `erasure/weights.py`.
        lora_rank: train a LoRA of this rank over the linear layers among them, instead of the weights themselves: the
            edit is then of low rank, and Adam's moments are as small. It takes larger steps than 1e-5.
        lora_alpha: its scale, times the rank; None is the rank.

    The others are `StudentConfig`'s and `RunConfig`'s.
    """

    weights: Rule = "x"
    lora_rank: int | None = Field(default=None, ge=1)
    lora_alpha: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _adapts(self) -> Self:
        if self.lora_rank is None and self.lora_alpha is not None:
            raise ValueError("lora_alpha is of a LoRA: set lora_rank too, or leave it out.")
        if self.lora_rank is not None and (option := self.of_single_weights()):
            raise ValueError(f"{option} is about single weights, and a LoRA moves whole layers: leave out lora_rank.")
        return self

    def of_single_weights(self) -> str | None:
        """The option, if one is set, that chooses or holds weights one by one."""
        return None


class StudentObjective(SoloObjective):
    """What fine-tuning erasers train: a student that starts as the model, beside the model itself, which stays frozen.

    `reads_null` says whether the method compares with what the model predicts without text, `every_level` that it
    trains at every noise level, as students of few steps know them not, `reads_pictures` that it shows the model
    pictures, and `always_retains` that something is retained where a request preserves nothing.

    Args:
        model: where training starts; stays as it is.
        config: options.
        request: what to erase and to preserve.
        seed: of what is drawn before training.

    Raises:
        ValueError: when the model knows no prompts, or has no null condition where one is read; when it is a student
            of one or few steps, draws by pictures alone, is in another precision than the run, or has no such
            weights; when it is to be told a guidance scale that it does not read.
    """

    reads_null: ClassVar[bool] = True
    every_level: ClassVar[bool] = True
    reads_pictures: ClassVar[bool] = False
    always_retains: ClassVar[bool] = False

    def __init__(self, model: Model, config: StudentConfig, request: Request, *, seed: int = 0) -> None:
        self.guidance, self.seed = self.guidance_told(model, config), seed
        self.null = with_guidance(model.null_condition(), self.guidance)
        if not model.any_condition().text_keys:
            raise ValueError(f"{model.source} knows no prompts, so there is nothing to erase by name.")
        if self.every_level:
            refuse_student(model)
        if not model.backbone.draws_from_text and not self.reads_pictures:
            raise ValueError(f"{model.source} draws nothing from text alone: use image_to_image, or uce.")
        if self.reads_null and not self.null:
            raise ValueError(f"{model.source} has no null condition, which this method reads: use concept_ablation.")
        guided = [name for name, value in config if name.endswith("_guidance") and value != 1]
        if guided and not self.null:
            raise ValueError(f"{model.source} has no null condition to guide by: set {' and '.join(guided)} to 1.")
        check_precision(model, config.mixed_precision)
        super().__init__(model, config, "student", self.make_player(model, config))
        self.frozen, self.shape = model.denoiser, model.latent_shape
        self.erased = self.bank(model, request.erase, config.templates)
        keeps = bool(request.preserve) and config.retain > 0
        self.kept = self.bank(model, request.preserve, config.templates) if keeps else None

    def make_player(self, model: Model, config: Any) -> Player:
        """What trains, beside the model: the selected weights of the denoiser, or a LoRA over them.

        Raises:
            ValueError: when nothing matches.
        """
        return denoiser_player(
            model,
            config.weights,
            learning_rate=config.learning_rate,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            seed=self.seed,
        )

    def guidance_told(self, model: Model, config: Any) -> float | None:
        """The guidance scale that the networks are told beside every prompt; None where they read none.

        Raises:
            ValueError: when options have one all the same.
        """
        if model.denoiser.reads_guidance:
            return model.guidance_scale if config.guidance_scale is None else config.guidance_scale
        if config.guidance_scale is not None:
            raise ValueError(f"{model.source} reads no guidance as an input: leave out guidance_scale.")
        return None

    def bank(
        self, model: Model, concepts: Sequence[Concept], templates: Sequence[str], *, anchored: bool = False
    ) -> PromptBank:
        """The concepts' prompts as the student is told them, or the same with anchors in their places."""
        return PromptBank(model, concept_groups(concepts, templates, anchored=anchored), self.guidance)

    def changes(self, model: Model) -> Changes:
        """What training came to: new values of the denoiser's weights, or a LoRA's changes."""
        return denoiser_changes(model, self.player)

    def unread(self, model: Model) -> list[str]:
        """The model's networks that training does not run once this objective is made."""
        return [name for name in model.components() if name != model.backbone.network_attribute]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    @property
    def student(self) -> Denoiser:
        """The network that trains."""
        return cast(Denoiser, self.player.module)

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return next(self.student.parameters()).device

    def loop(self, config: Any) -> Loop | None:
        """What a step does more often with `config` than with this objective's own brief options; None for nothing."""
        return None

    @abstractmethod
    def retain_error(self, batch: Batch, kept: PromptBank) -> Tensor:
        """What holds preserved concepts, a mean over the batch; only asked for where there are some."""

    def weighed(self, batch: Batch, terms: Mapping[str, tuple[float, Tensor]]) -> Loss:
        """The weighted sum of terms (weight, value) and of `retain_error`; logs their values."""
        if self.kept is not None:
            terms = {**terms, "retain": (self.config.retain, self.retain_error(batch, self.kept))}
        total = torch.stack([weight * value for weight, value in terms.values()]).sum()
        return Loss(total, {name: value for name, (_, value) in terms.items()})

    def exports(self) -> Artefact:
        return Artefact(self.player.config.artefact, self.student)


class FineTuningEraser(Eraser):
    """An eraser whose edit is what training made of the student's weights."""

    objective: ClassVar[type[StudentObjective]]

    def __init__(self, config: Any = None, /, **options: Any) -> None:
        super().__init__(config, **options)
        self.low_rank = isinstance(self.config, FineTuningConfig) and self.config.lora_rank is not None

    def solve(
        self, model: Model, request: Request, *, seed: int, detector: Detector | None, progress: bool
    ) -> Changes:
        return self.train(model, request, seed=seed, progress=progress)

    def train(
        self,
        model: Model,
        request: Request,
        *,
        seed: int,
        progress: bool,
        masks: Mapping[str, Tensor] | None = None,
    ) -> Changes:
        """What training makes of the selected weights.

        Args:
            model: where it starts; stays as it is.
            request: what to erase and to preserve.
            seed: all randomness derives from it.
            progress: show a progress bar.
            masks: bool, by full parameter key: where False, a weight keeps every bit.

        Raises:
            ValueError: as the objective.
        """
        config, home = self.config, model.device
        # What an objective draws before training is drawn where it trains.
        model.to(accelerator().device)
        try:
            with (
                attention_chosen(model, config.attention, autocast=config.mixed_precision == "bf16"),
                channels_last(model) if config.channels_last else contextlib.nullcontext(),
            ):
                objective = self.objective(model, config, request, seed=seed)
                if masks is not None:
                    keys = full_keys(model, objective.player)
                    objective.player.restrict({name: masks[key] for name, key in keys.items() if key in masks})
                # What is not run any more takes no memory of a GPU until the model goes home.
                for name in objective.unread(model):
                    model.component(name).to("cpu")
                fine_tune(model, objective, request, config, seed=seed, progress=progress)
            return objective.changes(model)
        finally:
            model.to(home)

    def plan(self, model: Model, request: Request) -> Plan:
        """What a training step will need, samplings included, and what comes before the first.

        What is drawn or searched for in many like steps is counted from one: the most that is alive does not depend on
        their number. Before training, operations are those of one step of each sampling.
        """
        keeps = request.preserve or self.objective.always_retains
        config = self.config if keeps else self.config.model_copy(update={"retain": 0.0})
        brief = config.brief()
        full = config.told() if model.denoiser.reads_guidance else config

        def made() -> Trainer:
            return Trainer(self.objective(model, brief, request), NoData(), trainer_config(brief), progress=False)

        def loop(objective: Objective) -> Loop | None:
            return cast(StudentObjective, objective).loop(full)

        with attention_chosen(model, config.attention if config.attention in WRITTEN_OUT else None):
            return plan(made, model.parameters().values(), loop)


def refuse_student(model: Model) -> None:
    """For methods that sample the model in many steps, or train it at all noise levels.

    Raises:
        ValueError: for a student of one or few steps, which draws nothing of use that way.
    """
    if model.is_student:
        raise ValueError(
            f"{model.source} is a student of one or few steps, which knows few noise levels: use one_step, or uce."
        )


def fine_tune(
    model: Model,
    objective: Objective,
    request: Request,
    config: RunConfig,
    *,
    seed: int,
    progress: bool,
    source: Source | None = None,
    prompts: Sequence[str] = (),
) -> None:
    """Runs the trainer; the model's weights stay as they are.

    Args:
        model: what the objective's players were made from, on the device where they train.
        objective: what to train.
        request: what it was made for.
        config: the run. A run that is resumed may change the number of steps and where they are kept, and no more.
        seed: all randomness derives from it.
        progress: show a progress bar.
        source: of what the objective needs; None for one that draws its own prompts.
        prompts: texts that it trains on beside the request's.

    Raises:
        Interrupted: when stopped by a signal and there is an `output_dir` to resume from.
        KeyboardInterrupt: when stopped without one.
        Diverged: when the loss is no longer finite.
        ValueError: when there is a checkpoint of another model, request or options.
    """
    with _run_folder(config.output_dir) as folder, torch.random.fork_rng(devices=[]):
        options = trainer_config(config, output_dir=folder, seed=seed)
        kept = config.model_dump(mode="json", exclude={"output_dir", "checkpointing_steps", "max_train_steps"})
        identity = fingerprint(model.content_hash(), request.to_dict(paths=False), _digests(request), kept, *prompts)
        trainer = Trainer(objective, source or NoData(), options, fingerprint=identity, progress=progress)
        try:
            trainer.run()
        except Interrupted as stopped:
            if config.output_dir is None:
                raise KeyboardInterrupt("Stopped; set output_dir to be able to resume.") from stopped
            raise


def trainer_config(config: RunConfig, **others: Any) -> TrainerConfig:
    """The trainer's options that an eraser's hold, and others."""
    shared = TrainerConfig.model_fields.keys() & type(config).model_fields.keys() - {"output_dir"}
    return TrainerConfig(**{name: getattr(config, name) for name in shared} | others)


def _digests(request: Request) -> list[str]:
    """The contents of all pictures."""
    files = [file for concept in (*request.erase, *request.preserve) for file in concept.images]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


class NoData:
    """A source of nothing but random streams."""

    provides: frozenset[str] = frozenset()

    def batch(self, random: SampleRandom) -> Batch:
        return Batch(Condition(), random)


@contextlib.contextmanager
def _run_folder(output_dir: Path | None) -> Iterator[Path]:
    if output_dir is not None:
        yield output_dir
        return
    with tempfile.TemporaryDirectory(prefix="sublimate-") as folder:
        yield Path(folder)
