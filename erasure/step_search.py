"""How far to go along one direction: a bracketed search that ends, and returns the best step it has seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """What one step came to.

    Attributes:
        step: its length, positive.
        left: share of pictures that still show what is erased, in [0, 1].
        kept: share of the other pictures that show what they should, in [0, 1].
        missing: by how much too much is left, and too little kept; 0 is enough.
    """

    step: float
    left: float
    kept: float
    missing: float


def bracketed_search(
    probe: Callable[[float], tuple[float, float]],
    start: float,
    limit: float,
    *,
    max_left: float,
    min_kept: float,
    probes: int,
) -> tuple[Probe, list[Probe]]:
    """Looks for a step that erases enough and keeps enough.

    A step that keeps too little is too long, whatever it erases; any other that erases too little is too short. So
    every probe moves one end of the bracket: steps double until one is too long, then the bracket is halved. Neither
    share needs to be monotone in the step, so no end of the bracket is trusted: the best of all steps is returned.

    Args:
        probe: step -> (left, kept).
        start: the first step.
        limit: the longest.
        max_left, min_kept: what is enough.
        probes: how many steps are tried at most; the search ends there at the latest.

    Returns:
        The best probe (see `best_probe`), and all in order.

    Raises:
        ValueError: for a start outside (0, limit], or no probes.
    """
    if not 0 < start <= limit or probes < 1:
        raise ValueError(f"A search starts within its limit and probes: got {start:g} of {limit:g}, {probes} probes.")
    low, high, step = 0.0, limit, start
    seen: list[Probe] = []
    bounded = False
    while len(seen) < probes:
        left, kept = probe(step)
        seen.append(Probe(step, left, kept, max(0.0, left - max_left) + max(0.0, min_kept - kept)))
        if seen[-1].missing == 0:
            break
        if kept < min_kept:
            high, bounded = step, True
        else:
            low = step
        step = (low + high) / 2 if bounded else min(2 * step, limit)
        if step == low:  # the limit is too short
            break
    return best_probe(seen), seen


def best_probe(seen: Sequence[Probe]) -> Probe:
    """The probe that misses least, the shorter of equals."""
    return min(seen, key=lambda probe: (probe.missing, probe.step))


class Ray:
    """theta + lambda G for some weights, at steps of relative length s = lambda |G| / |theta|, theta the start's.

    Args:
        weights: by name; `moved` changes them in place.
        gradient: by the same names.
        names: which of them move.
    """

    def __init__(self, weights: Mapping[str, Tensor], gradient: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self.weights = {name: weights[name] for name in names}
        self.start = {name: weights[name].detach().clone() for name in names}
        self.gradient = {name: gradient[name] for name in names}
        theta, g = (torch.cat([v.flatten() for v in group.values()]).norm() for group in (self.start, self.gradient))
        self.unit = float(theta / g)  # lambda of the step of length 1

    def at(self, step: float) -> dict[str, Tensor]:
        """The weights at a step."""
        return {name: value + step * self.unit * self.gradient[name] for name, value in self.start.items()}

    @contextlib.contextmanager
    def moved(self, step: float) -> Iterator[None]:
        """Within this context the weights are there; afterwards they are back, bit by bit."""
        with torch.no_grad():
            for name, value in self.at(step).items():
                self.weights[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in self.start.items():
                    self.weights[name].copy_(value)
