"""Small plots inside a report: intervals on an axis as SVG whose widths are percentages, so that text never scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sublimate.evaluation.criteria import Criterion
from sublimate.evaluation.intervals import Rate

_STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5)
_MOST_TICKS = 6


@dataclass(frozen=True)
class Axis:
    """A linear axis; low and high are fractions of 1, ticks lie within them."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, criteria: Sequence[Criterion]) -> Axis:
        """An axis that shows every interval, every bar and zero; up to 100 % where bars are minima."""
        low = min(0.0, *(criterion.low for criterion in criteria))
        high = max(1.0 if c.at_least else max(c.high, 1.25 * c.bar) for c in criteria)
        step = next((step for step in _STEPS if (high - low) / step <= _MOST_TICKS), 1.0)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(first * step, last * step, tuple(index * step for index in range(first, last + 1)))

    def place(self, value: float) -> float:
        """Where a value lies, in percent of the width."""
        return 100 * (value - self.low) / (self.high - self.low)


def forest_strip(criterion: Criterion, axis: Axis) -> str:
    """One row of a forest plot: interval, value, the bar, and the side of it that meets it."""
    low, value, high = (axis.place(x) for x in (criterion.low, criterion.value, criterion.high))
    bar, zero = axis.place(criterion.bar), axis.place(0.0)
    start, width = (bar, 100 - bar) if criterion.at_least else (0.0, bar)
    label = (
        f"{100 * criterion.value:.1f} % with interval {100 * criterion.low:.1f} to {100 * criterion.high:.1f} %, "
        f"bar at {'least' if criterion.at_least else 'most'} {100 * criterion.bar:.1f} %"
    )
    return (
        f"<svg class='forest' role='img' aria-label='{label}'>"
        f"<rect class='allowed' x='{start:.2f}%' y='0' width='{width:.2f}%' height='100%'/>"
        f"<line class='zero' x1='{zero:.2f}%' x2='{zero:.2f}%' y1='0' y2='100%'/>"
        f"<line class='bar' x1='{bar:.2f}%' x2='{bar:.2f}%' y1='0' y2='100%'/>"
        f"<line class='whisker' x1='{low:.2f}%' x2='{high:.2f}%' y1='50%' y2='50%'/>"
        f"<circle class='dot' cx='{value:.2f}%' cy='50%' r='6'/></svg>"
    )


def axis_strip(axis: Axis) -> str:
    """The ticks below a forest plot."""
    marks = []
    for tick in axis.ticks:
        x = axis.place(tick)
        text = f"{100 * tick:g}".replace("-", "\N{MINUS SIGN}")
        unit = " %" if tick == axis.ticks[-1] else ""
        marks.append(f"<line x1='{x:.2f}%' x2='{x:.2f}%' y1='0' y2='4'/><text x='{x:.2f}%' y='16'>{text}{unit}</text>")
    return f"<svg class='forest ticks' aria-hidden='true'>{''.join(marks)}</svg>"


def rate_strip(rate: Rate) -> str:
    """A rate and its interval between 0 and 100 %, as thin as a line of text."""
    low, high = 100 * rate.low, 100 * rate.high
    return (
        "<svg class='range' aria-hidden='true'><rect class='track' width='100%' height='100%' rx='3'/>"
        f"<rect class='fill' width='{100 * rate.value:.2f}%' height='100%' rx='3'/>"
        f"<rect class='span' x='{low:.2f}%' width='{high - low:.2f}%' y='2' height='2'/></svg>"
    )
