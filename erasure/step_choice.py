"""Which step of a training to keep: measured after every step, on noise and prompts that never change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def best_step(gains: Sequence[float], drifts: Sequence[float], bound: float) -> int:
    """The step with the largest gain among those whose drift is within the bound; the earliest of equals.

    Args:
        gains: how much is forgotten, by step; the first is that of the untrained start.
        drifts: how far all else has moved, by step, not negative.
        bound: the largest drift that is allowed.

    Raises:
        ValueError: when no step gains anything within the bound.
    """
    allowed = [step for step, drift in enumerate(drifts) if drift <= bound]
    best = max(allowed, key=lambda step: (gains[step], -step), default=0)
    if best == 0:
        raise ValueError(
            f"No step forgets anything within a drift of {bound:g} (the first moves {drifts[1]:.3g}): lower the "
            "learning rate, or raise max_drift."
        )
    return best


class StepChoice:
    """Keeps the values of the best step so far, and the measures of all.

    Args:
        parameters: what trains, by name.
        measure: gives (gain, drift) of the weights as they are.
        bound: the largest drift that is allowed.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], measure: Callable[[], tuple[float, float]], bound: float
    ) -> None:
        self.parameters, self.measure, self.bound = parameters, measure, bound
        self.measures: list[tuple[float, float]] = [measure()]
        self.values = self._copy()

    def step(self) -> None:
        """Measures the step that has just been made, and keeps its weights if they are the best so far."""
        gain, drift = self.measure()
        before = [g for g, d in self.measures if d <= self.bound]
        self.measures.append((gain, drift))
        if drift <= self.bound and gain > max(before):
            self.values = self._copy()

    def chosen(self) -> int:
        """The step whose weights `values` holds; see `best_step`."""
        gains, drifts = zip(*self.measures, strict=True)
        return best_step(gains, drifts, self.bound)

    def outcome(self) -> dict[str, Any]:
        """The choice and what it was made from, as JSON values."""
        gains, drifts = ([round(value, 6) for value in values] for values in zip(*self.measures, strict=True))
        return {"step": self.chosen(), "steps": len(gains) - 1, "gains": gains, "drifts": drifts}

    def state(self) -> dict[str, Tensor]:
        """All that must survive a restart."""
        kept = {f"best.{name}": value for name, value in self.values.items()}
        return {"measures": torch.tensor(self.measures, dtype=torch.float64), **kept}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state()`."""
        self.measures = [(float(gain), float(drift)) for gain, drift in state["measures"]]
        self.values = {name: state[f"best.{name}"].cpu().clone() for name in self.values}

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
