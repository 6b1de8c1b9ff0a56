"""The contract every training objective fulfils, and the small values that pass between it and the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.pipelines.few_steps import FewSteps
from sublimate.training.config import Config
from sublimate.training.players import Player
from sublimate.training.randomness import SampleRandom


class ObjectiveConfig(Config, ABC):
    """Base of every objective's options; defaults are the paper's."""

    _teacher_is_told: bool = PrivateAttr(default=False)

    @property
    def sample_guidance(self) -> float:
        """Guidance of the teacher's own samples, where those are the data: its scale, or the middle of its range."""
        low, high = getattr(self, "guidance_range", None) or (1.0, 1.0)
        return float(getattr(self, "guidance_scale", (low + high) / 2))

    @abstractmethod
    def passes(self, step: int = 0) -> float:
        """Network passes per sample in one training step: forward 1, backward 2 to weights and 1 to inputs alone.

        A pass that ends with the features it is made for counts as a whole one.
        """

    def phases(self) -> tuple[int, ...]:
        """The steps from which a training step does something else, ascending from 0.

        What a method promises it has done only after its last phase: a run should go beyond its beginning.
        """
        return (0,)

    def guided_passes(self, guided: bool) -> int:
        """Network passes of one prediction, guided or not.

        An objective's own `config` knows whether its teacher is told the scale, which takes one; other options do not,
        and count two.
        """
        return 2 if guided and not self._teacher_is_told else 1

    def told(self) -> Self:
        """These options, for a teacher that is told the guidance scale."""
        twin = self.model_copy()
        twin._teacher_is_told = True
        return twin


@dataclass(frozen=True)
class Turn:
    """One optimiser step inside a training step.

    Attributes:
        name: keys its randomness.
        trains: the players that move.
        like: the turn of the same step whose passes it takes again, with other draws: one of them tells both costs.
    """

    name: str
    trains: tuple[str, ...]
    like: str | None = None


@dataclass(frozen=True)
class Batch:
    """What one turn works on, batch first throughout.

    Attributes:
        condition: what the samples are conditioned on (empty for an unconditional model).
        random: one random stream per sample.
        tensors: data the objective asked for in `needs`, and whatever its `prepare` added; each (batch, ...).
    """

    condition: Condition
    random: SampleRandom
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.random)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def adding(self, **tensors: Tensor) -> Batch:
        """This batch with more tensors."""
        return replace(self, tensors={**self.tensors, **tensors})

    def part(self, start: int, stop: int) -> Batch:
        """The micro-batch [start, stop)."""
        picked = slice(start, stop)
        return Batch(
            condition=self.condition.index(picked) if self.condition else self.condition,
            random=self.random[picked],
            tensors={name: tensor[picked] for name, tensor in self.tensors.items()},
        )


@dataclass(frozen=True)
class Loss:
    """A scalar to differentiate, a mean over the micro-batch's samples, and scalars worth logging (detached)."""

    total: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Artefact:
    """What a finished objective hands to the exporter.

    Attributes:
        kind: the format on disk: a stock pipeline, a LoRA for the base, or an addition that only this library loads.
        module: what was trained.
        start_time: the time at which a student is given pure noise; None is the schedule's end.
        few_steps: how the student is sampled in several steps; None for a student of one step.
        as_base: it is no such student, but sampled as the base is.
        attachment: what `pipelines.attachments.export_attachment` is told of an attachment: its name, options, summary
            and usage.
    """

    kind: Literal["weights", "lora", "attachment"]
    module: nn.Module
    start_time: float | None = None
    few_steps: FewSteps | None = None
    as_base: bool = False
    attachment: Mapping[str, Any] = field(default_factory=dict)


class Objective(ABC):
    """A training objective: who plays, whose turn it is, and what the turn minimises.

    The trainer owns everything else (devices, accumulation, optimisers, EMA, checkpoints). `prepare` runs without
    gradients on the process's whole batch, networks `in_parts` of it: whatever couples samples is decided there, with
    `mean_over_processes` where the coupling reaches further. `loss` then treats samples independently, so that
    micro-batches and processes change nothing but rounding, and never changes weights.

    Args:
        model: what is trained, or the frozen teacher.
        config: an instance of the class's `Config`.
    """

    Config: ClassVar[type[ObjectiveConfig]]
    paper: ClassVar[str]

    def __init__(self, model: Any, config: Any) -> None:
        denoiser = getattr(model, "denoiser", None)  # not all that trains is one
        self.config = config.told() if isinstance(denoiser, Denoiser) and denoiser.reads_guidance else config
        self.mean_over_processes: Callable[[Tensor], Tensor] = lambda tensor: tensor
        self.micro_batch: int | None = None

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """Data this objective reads, of {"prompts", "negatives", "images", "samples", "masks", "low_res",
        "activations"}."""

    @abstractmethod
    def players(self) -> dict[str, Player]:
        """The networks that train, by name; the same objects on every call."""

    @property
    def shardable(self) -> bool:
        """Whether full players may be sharded (`training/fsdp.py`): their weights are used by calling them alone."""
        return True

    @abstractmethod
    def turns(self, step: int) -> tuple[Turn, ...]:
        """The optimiser steps of training step `step`, in order, with distinct names."""

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        """Decides on the whole batch, without gradients, what `loss` needs beyond the data."""
        return batch

    def in_parts(self, compute: Callable[[Batch], Sequence[Tensor]], batch: Batch) -> list[Tensor]:
        """What networks make of a whole batch, a micro-batch at a time: they need no more memory than in `loss`."""
        if self.micro_batch is None or len(batch) <= self.micro_batch:
            return list(compute(batch))
        firsts = range(0, len(batch), self.micro_batch)
        parts = [compute(batch.part(first, first + self.micro_batch)) for first in firsts]
        return [torch.cat(found) for found in zip(*parts, strict=True)]

    @abstractmethod
    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        """The turn's loss on a micro-batch."""

    def after_step(self, step: int) -> None:  # noqa: B027 (most objectives have nothing to do here)
        """Runs once all turns of a step are done."""

    def state(self) -> dict[str, Tensor]:
        """Whatever must survive a restart and is not a player, as named tensors."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state()`.

        Raises:
            ValueError: when the checkpoint holds state that this objective does not have.
        """
        if state:
            raise ValueError(f"The checkpoint holds state this objective does not know: {sorted(state)}.")

    @abstractmethod
    def exports(self) -> Artefact:
        """What remains when training is done."""

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Name and paper, for provenance."""
        return {"method": cls.__module__.rsplit(".", 1)[-1], "paper": cls.paper}


class SoloObjective(Objective):
    """An objective with a single player, which trains once per step.

    Args:
        model: what is trained, or the frozen teacher.
        config: an instance of the class's `Config`.
        name: of the player, and of its turn.
        player: the network that trains.
    """

    def __init__(self, model: Any, config: Any, name: str, player: Player) -> None:
        super().__init__(model, config)
        self.name, self.player = name, player

    def players(self) -> dict[str, Player]:
        return {self.name: self.player}

    def turns(self, step: int) -> tuple[Turn, ...]:
        return (Turn(self.name, (self.name,)),)
