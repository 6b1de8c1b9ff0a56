"""What a training run will need, counted before it starts: a step with tensors that have shapes but no storage."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from sublimate.pipelines.attention import attention_chosen
from sublimate.pipelines.gradient_checkpointing import checkpointed
from sublimate.pipelines.model import Model
from sublimate.pipelines.shapes import open_shapes
from sublimate.training import registry
from sublimate.training.config import validate_section
from sublimate.training.data import ModelSource
from sublimate.training.distill import OBJECTIVES, DistillConfig
from sublimate.training.objective import Objective, Turn
from sublimate.training.precision import check_precision
from sublimate.training.sources import unread_networks
from sublimate.training.trainer import Trainer

T = TypeVar("T")

# Only what writes scores out takes other memory than the kernel that is there.
WRITTEN_OUT = ("math", "eager")

# Torch counts the fused kernels of GPUs, not that of CPUs, which stands for them here.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **__: (
        sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


FORMULAS = flop_registry | {operation: shape_wrapper(formula) for operation, formula in CPU_ATTENTION.items()}


class Meter(TorchDispatchMode):
    """Counts floating-point operations, and follows the bytes of all storages that exist while it is on.

    A storage counts from the first operation that shows it until it is freed, once however many tensors share it.
    Operations are counted by torch's formulas, as by its `FlopCounterMode`, without a second mode around each of them.

    Attributes:
        flops: floating-point operations.
        now: bytes alive.
        peak: the most there were since `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None and _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        self.see(tree_iter(result))
        return result

    def see(self, tensors: Iterable[Any]) -> None:
        """Counts storages that were there before."""
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            name, size = storage._cdata, storage.nbytes()
            if name in self._known:
                continue
            self._known.add(name)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, name, size)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leaves out storages that are elsewhere, whatever reads them."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def reset_peak(self) -> None:
        """Starts the peak anew from what is alive."""
        self.peak = self.now

    def _forget(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operation is made of others, into which inference mode does not take it apart by itself."""
    name = func.name()
    known = torch._C._dispatch_has_kernel(name)
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


@dataclass(frozen=True)
class Loop:
    """What the first turn of a step repeats.

    Attributes:
        run: does it once.
        times: how often the step does it on average, beyond what it does here.
    """

    run: Callable[[], object]
    times: float


@dataclass(frozen=True)
class PlayerCost:
    """Bytes of one player beyond what it shares: weights of its own, gradients, Adam's moments and the average."""

    weights: int
    gradients: int
    optimizer: int
    average: int


@dataclass(frozen=True)
class TurnCost:
    """One turn, or what comes before.

    Attributes:
        flops: floating-point operations.
        peak: the most bytes alive at any moment of it.
        times: how many turns of a step are like it, itself included.
    """

    flops: int
    peak: int
    times: int = 1


@dataclass(frozen=True)
class Plan:
    """What a step of a run costs on one process.

    Attributes:
        base: bytes of the model that players share: denoiser, text encoders, autoencoder.
        players: by name.
        turns: of the first step, by name.
        later: the turns of the first step of each later phase that takes other passes, by step.
        before: what is done once, before the first step; None where it is not counted.
    """

    base: int
    players: Mapping[str, PlayerCost]
    turns: Mapping[str, TurnCost]
    later: Mapping[int, Mapping[str, TurnCost]] = field(default_factory=dict)
    before: TurnCost | None = None

    @property
    def flops(self) -> int:
        """Of one training step, in the phase where it takes most."""
        steps = (self.turns, *self.later.values())
        return max(sum(turn.times * turn.flops for turn in turns.values()) for turns in steps)

    @property
    def peak(self) -> int:
        """The most bytes alive at any moment."""
        costs = [turn for turns in (self.turns, *self.later.values()) for turn in turns.values()]
        return max(cost.peak for cost in (*costs, *([self.before] if self.before else [])))

    def lines(self) -> list[str]:
        """The plan as text, a line for each part."""
        players = [
            f"{name}: weights {gib(c.weights)}, gradients {gib(c.gradients)}, Adam {gib(c.optimizer)}, average "
            f"{gib(c.average)}"
            for name, c in self.players.items()
        ]
        named = {"before training": self.before} if self.before else {}
        named |= {f"turn {name}": turn for name, turn in self.turns.items()}
        for step, costs in self.later.items():
            named |= {f"from step {step:,}, turn {name}": turn for name, turn in costs.items()}
        turns = [
            f"{name}: {f'{cost.times} times ' if cost.times > 1 else ''}{cost.flops / 1e12:,.4g} TFLOP, "
            f"peak {gib(cost.peak)}"
            for name, cost in named.items()
        ]
        return [f"shared weights: {gib(self.base)}", *players, *turns]


def counted(meter: Meter, work: Callable[[], T]) -> tuple[T, TurnCost]:
    """What work returns, its operations, and the peak of bytes that `meter`, which is on, sees meanwhile."""
    meter.reset_peak()
    before, result = meter.flops, work()
    return result, TurnCost(meter.flops - before, meter.peak)


def plan_distillation(config: DistillConfig, model: Model | None = None) -> Plan:
    """What a distillation will need while it trains, from the shapes of its teacher alone.

    Networks whose answers are stored (`data.cache_dir`) have left the memory by then.

    Args:
        config: the run.
        model: the teacher's shapes, where they are open already.

    Raises:
        ValueError: when the teacher's shapes cannot be known, or the method does not fit it.
    """
    method = registry.load(OBJECTIVES, config.method, Objective)
    if model is None:
        model = open_shapes(
            config.file_config or config.model, revision=config.revision, dtype=getattr(torch, config.dtype)
        )
    check_precision(model, config.trainer.mixed_precision)
    kernel = config.attention if config.attention in WRITTEN_OUT else None
    parked = [p for name in unread_networks(model, config.data) for p in model.component(name).parameters()]
    saving = checkpointed(model) if config.trainer.gradient_checkpointing else nullcontext()
    with attention_chosen(model, kernel), saving:
        options = validate_section(method.Config, config.objective)
        found = plan(
            lambda: _trainer(config, method, model),
            model.parameters().values(),
            parked=parked,
            phases=[step for step in options.phases() if step < config.trainer.max_train_steps],
        )
    # What the data need before training depends on them.
    return replace(found, before=None)


def _trainer(config: DistillConfig, method: type[Objective], model: Model) -> Trainer:
    objective = method(model, validate_section(method.Config, config.objective))
    # A prompt of any text, and a class of any model that is told one.
    prompts, x0 = ["0"] if model.any_condition() else [], torch.zeros(1, *model.latent_shape)
    source = ModelSource(model, prompts, x0, prompts if "negatives" in objective.needs else (), x0)
    return Trainer(objective, source, config.trainer, progress=False)


def plan(
    make: Callable[[], Trainer],
    base: Iterable[Tensor],
    loop: Callable[[Objective], Loop | None] = lambda _: None,
    *,
    parked: Iterable[Tensor] = (),
    phases: Sequence[int] = (0,),
) -> Plan:
    """Takes a trainer's first step, without clipping but with Adam's moments already there, and counts.

    Of a method in phases it also takes the first step of each that takes other turns or passes.

    What is counted are tensors: a device's libraries and its allocator's gaps come on top.

    Args:
        make: the trainer, of a model opened by `open_shapes`; a real one would be trained.
        base: the model's parameters, which the players may share.
        loop: a part of the objective's steps that is too long to be taken in full here.
        parked: the model's parameters that have left the memory.
        phases: the steps at which they begin, from 0 on.
    """
    held = {id(p): p for p in base}
    with Meter() as meter:
        meter.ignore(parked)
        meter.see(held.values())
        shared = meter.now
        trainer, before = counted(meter, make)
        for name, optimizer in trainer.optimizers.items():
            for parameter in trainer.players[name].trainable().values():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        turns, later = _turns(meter, trainer), {}
        for last, step in pairwise(phases):
            for done in range(last, step):
                trainer.objective.after_step(done)
            trainer.step = step
            if _kind(trainer, step) != _kind(trainer, last):
                later[step] = _turns(meter, trainer)
        if repeated := loop(trainer.objective):
            with trainer.autocast():
                _, once = counted(meter, repeated.run)
            first, cost = next(iter(turns.items()))
            flops = cost.flops + round(repeated.times * once.flops)
            turns[first] = replace(cost, flops=flops, peak=max(cost.peak, once.peak))
    players = {}
    for name, player in trainer.players.items():
        trains = player.trainable().values()
        own = {id(p): p for p in player.module.parameters() if id(p) not in held}
        held |= own
        average = trainer.averages[name].values.values() if name in trainer.averages else ()
        moments = [v for state in trainer.optimizers[name].state.values() for v in state.values()]
        players[name] = PlayerCost(_bytes(own.values()), _bytes(trains), _bytes(moments), _bytes(average))
    return Plan(shared, players, turns, later, before)


def _kind(trainer: Trainer, step: int) -> tuple[object, ...]:
    """What tells the cost of a training step from another's."""
    return (trainer.objective.config.passes(step), *trainer.objective.turns(step))


def _turns(meter: Meter, trainer: Trainer) -> dict[str, TurnCost]:
    """The costs of the turns of the trainer's step, of those that are like others once."""
    turns = trainer.objective.turns(trainer.step)
    times = Counter(turn.like or turn.name for turn in turns)
    costs = {t.name: counted(meter, partial(_take, trainer, t))[1] for t in turns if t.like is None}
    return {name: replace(cost, times=times[name]) for name, cost in costs.items()}


def _take(trainer: Trainer, turn: Turn) -> None:
    trainer.accumulate(turn)
    trainer.update(turn)


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def gib(size: int) -> str:
    """Bytes as text."""
    return f"{size / 2**30:.3g} GiB"
