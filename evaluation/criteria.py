"""The bars a result is held to, and whether the measurement is certain to be on its side of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sublimate.evaluation.intervals import Difference, Rate


@dataclass(frozen=True)
class Criterion:
    """One measured number against its bar.

    Attributes:
        name: a short name, unique within a result ("target").
        question: the same as a sentence a reader understands ("How often is a seven still drawn?").
        value: what was measured, a fraction of 1.
        low: lower limit of its interval.
        high: upper limit of its interval.
        n: images or pairs behind it.
        bar: what it is held to.
        at_least: whether the bar is a minimum; otherwise it is a maximum.
        unit: of a hundredth: "%" for rates, "points" for differences of rates.
    """

    name: str
    question: str
    value: float
    low: float
    high: float
    n: int
    bar: float
    at_least: bool = False
    unit: str = "%"

    @property
    def met(self) -> bool:
        """Whether the measured value is on the right side of the bar."""
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    @property
    def certain(self) -> bool:
        """Whether the whole interval lies on the same side as the value; more images make it narrower."""
        if self.met:
            return self.low >= self.bar if self.at_least else self.high <= self.bar
        return self.high < self.bar if self.at_least else self.low > self.bar

    def to_dict(self) -> dict[str, Any]:
        """The numbers, and what they say about the bar."""
        return {**asdict(self), "met": self.met, "certain": self.certain}


def rate_criterion(name: str, question: str, rate: Rate, bar: float, *, at_least: bool = False) -> Criterion:
    """A rate against a bar."""
    return Criterion(name, question, rate.value, rate.low, rate.high, rate.n, bar, at_least)


def loss_criterion(name: str, question: str, change: Difference, bar: float) -> Criterion:
    """What was lost (the first run's rate minus the second's) against the most that may be lost."""
    # 0.0 - x rather than -x: a loss of nothing must not read "-0".
    loss, low, high = 0.0 - change.value, 0.0 - change.high, 0.0 - change.low
    return Criterion(name, question, loss, low, high, change.n, bar, unit="points")


def rise_criterion(name: str, question: str, change: Difference, bar: float) -> Criterion:
    """What was added (the second run's rate minus the first's) against the most that may be added."""
    return Criterion(name, question, change.value, change.low, change.high, change.n, bar, unit="points")


def verdict_sentence(criteria: Sequence[Criterion], more: Sequence[str] = ()) -> str:
    """One sentence that says how many bars are met, which are not, and which are not certain at this n.

    Args:
        criteria: at least one.
        more: what else belongs into it.

    Raises:
        ValueError: without criteria.
    """
    if not criteria:
        raise ValueError("a verdict needs at least one criterion")
    missed = [criterion.name for criterion in criteria if not criterion.met]
    unsure = [criterion.name for criterion in criteria if not criterion.certain]
    total = f"all {len(criteria)} bars" if len(criteria) > 1 else "its one bar"
    head = f"Misses {len(missed)} of {len(criteria)} bars: {', '.join(missed)}" if missed else f"Meets {total}"
    tail = f"; not yet certain at this number of images: {', '.join(unsure)}" if unsure else ""
    return f"{'; '.join([f'{head}{tail}', *more])}."
