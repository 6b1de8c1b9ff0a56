"""What torch's allocator reports of a step, for comparison with counted plans."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from sublimate.pipelines.model import Model
from sublimate.training.ema import Average
from sublimate.training.trainer import Trainer


def kept_bytes(model: Model, trainer: Trainer) -> int:
    """Bytes of what stays alive between steps: weights, moments, averages, and what the objective holds."""
    kept = list(model.parameters().values())
    for name, player in trainer.players.items():
        kept += player.module.parameters()
        kept += [value for state in trainer.optimizers[name].state.values() for value in state.values()]
        kept += trainer.averages[name].values.values() if name in trainer.averages else []
    for held in vars(trainer.objective).values():
        held = held.values if isinstance(held, Average) else held
        kept += held.parameters() if isinstance(held, nn.Module) else held.values() if isinstance(held, dict) else []
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in kept}.values() if isinstance(t, Tensor))


def most_allocated(work: Callable[[], Any]) -> int:
    """The most bytes that work allocates at a time, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = sorted(_allocated(profiled.profiler.kineto_results.experimental_event_tree()))
    return max(itertools.accumulate(size for _, size in events))


def _allocated(events: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """(time, bytes) of everything that was allocated, and minus as many when it was freed."""
    for event in events:
        if event.typed[0] == _EventType.Allocation:
            yield event.start_time_ns, event.typed[1].alloc_size
        yield from _allocated(event.children)
