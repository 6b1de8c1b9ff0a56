"""Exponential moving averages of the parameters that train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sublimate.training.whole import share, whole


class Average:
    """The moving average of named parameters in float32: average <- decay * average + (1 - decay) * parameter.

    Args:
        parameters: gives the live parameters, whenever they are read; the average starts at their values.
        decay: in [0, 1); per student update, not per critic update.
    """

    def __init__(self, parameters: Callable[[], Mapping[str, nn.Parameter]], decay: float) -> None:
        self._live, self.decay = parameters, decay
        self.values: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in parameters().items()}

    @torch.no_grad()
    def update(self, count: int | None = None) -> None:
        """Moves the average one step towards the live parameters.

        Args:
            count: how many updates this one makes; the decay is then at most count/(count + 9), so that a short run's
                average forgets where it started (as in diffusers' `EMAModel`). None: it is `decay` from the first on.
        """
        decay = self.decay if count is None else min(self.decay, count / (count + 9))
        live = {name: parameter.detach().float() for name, parameter in self._live().items()}
        torch._foreach_lerp_([self.values[name] for name in live], list(live.values()), 1 - decay)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Restores saved averages, matched by name."""
        for name, value in self.values.items():
            value.copy_(share(values[name], value))

    def gather(self) -> None:
        """Makes values whole that are sharded; every process must take part."""
        self.values = {name: whole(value) for name, value in self.values.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the live parameters hold the average; afterwards they are as before, bit for bit."""
        kept = {name: p.detach().clone() for name, p in self._live().items()}
        self.store()
        try:
            yield
        finally:
            self._set(kept)

    def store(self) -> None:
        """Gives the live parameters the average for good."""
        self._set(self.values)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._live().items():
            parameter.copy_(values[name])
