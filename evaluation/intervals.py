"""Numbers with their uncertainty: Wilson intervals, paired differences, means, and the spread over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass


def _quantile(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence!r}; give a number between 0 and 1, such as 0.95")
    return statistics.NormalDist().inv_cdf((1.0 + confidence) / 2.0)


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a binomial rate.

    Unlike the textbook p +- z sqrt(p (1 - p) / n) it stays inside [0, 1] and has a width at zero hits, which is where
    an erased concept lives.

    Args:
        hits: successes, 0 <= hits <= n.
        n: trials, at least 1.
        confidence: of the two-sided interval.

    Returns:
        Lower and upper limit.

    Raises:
        ValueError: for counts that are no rate, or a confidence outside (0, 1).

    Source: Wilson 1927, Journal of the American Statistical Association 22(158).
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n} is not a rate; hits must lie between 0 and n, and n must be at least 1")
    z2 = _quantile(confidence) ** 2
    p = hits / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At the ends the limit is exactly the end; the formula misses it in the last bit.
    return (0.0 if hits == 0 else centre - half, 1.0 if hits == n else centre + half)


def images_needed(bar: float, confidence: float = 0.95) -> int:
    """How many trials it takes, at least, for the interval of a rate to lie below a bar: as many as do without a hit.

    The interval of a paired difference of rates near 1 is no narrower, so a loss takes as many pairs.

    Args:
        bar: in (0, 1).
        confidence: of the two-sided interval.

    Raises:
        ValueError: for a bar or a confidence outside (0, 1).
    """
    if not 0.0 < bar < 1.0:
        raise ValueError(f"the bar is {bar!r}; give a rate between 0 and 1")
    # Without hits Wilson's upper limit is z^2 / (n + z^2).
    return math.ceil(_quantile(confidence) ** 2 * (1.0 - bar) / bar)


@dataclass(frozen=True)
class Rate:
    """How often something happened: `hits` of `n`, with its Wilson interval.

    Attributes:
        hits: successes.
        n: trials.
        confidence: of the interval, 0.95 unless told.
    """

    hits: int
    n: int
    confidence: float = 0.95

    def __post_init__(self) -> None:
        wilson(self.hits, self.n, self.confidence)  # raises for counts that are no rate

    @classmethod
    def of(cls, outcomes: Sequence[bool], confidence: float = 0.95) -> Rate:
        """The rate of True among `outcomes`."""
        return cls(sum(map(bool, outcomes)), len(outcomes), confidence)

    @property
    def value(self) -> float:
        """hits / n."""
        return self.hits / self.n

    @property
    def low(self) -> float:
        """Lower limit of the interval."""
        return wilson(self.hits, self.n, self.confidence)[0]

    @property
    def high(self) -> float:
        """Upper limit of the interval."""
        return wilson(self.hits, self.n, self.confidence)[1]

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}], n={self.n}"


@dataclass(frozen=True)
class Mean:
    """An average, and how far it would move from draw to draw.

    Attributes:
        value: the average of n values.
        error: its standard error.
        n: how many were averaged.
    """

    value: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The average of at least two values."""
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values))

    def __str__(self) -> str:
        return f"{self.value:.4f} +- {self.error:.4f} (n={self.n})"


@dataclass(frozen=True)
class Difference:
    """The difference second - first of two rates measured on the same pairs (same prompt, same seed).

    Attributes:
        both: pairs where both succeeded.
        only_first: pairs where only the first did.
        only_second: pairs where only the second did.
        neither: pairs where none did.
        confidence: of the interval, 0.95 unless told.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    confidence: float = 0.95

    def __post_init__(self) -> None:
        _quantile(self.confidence)
        if min(self.both, self.only_first, self.only_second, self.neither) < 0 or self.n < 1:
            raise ValueError(f"{self!r} counts no pairs; counts must not be negative and at least one pair is needed")

    @property
    def n(self) -> int:
        """The number of pairs."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def value(self) -> float:
        """Rate of the second minus rate of the first, in [-1, 1]."""
        return (self.only_second - self.only_first) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Newcombe's square-and-add interval with the pairs' correlation (his method 10).

        Source: Newcombe 1998, Statistics in Medicine 17, 2635-2650.
        """
        a, b, c, d = self.both, self.only_second, self.only_first, self.neither
        (l1, u1), (l2, u2) = wilson(a + b, self.n, self.confidence), wilson(a + c, self.n, self.confidence)
        p1, p2 = (a + b) / self.n, (a + c) / self.n
        # The correlation of the pairs, with a continuity correction on its positive side only.
        determinant: float = a * d - b * c
        if determinant > 0:
            determinant = max(determinant - self.n / 2, 0.0)
        margins = (a + b) * (c + d) * (a + c) * (b + d)
        phi = determinant / math.sqrt(margins) if margins else 0.0

        def added(first: float, second: float) -> float:
            return math.sqrt(max(first**2 - 2 * phi * first * second + second**2, 0.0))

        return (
            max(self.value - added(p1 - l1, u2 - p2), -1.0),
            min(self.value + added(u1 - p1, p2 - l2), 1.0),
        )

    @property
    def low(self) -> float:
        """Lower limit of the interval."""
        return self.interval[0]

    @property
    def high(self) -> float:
        """Upper limit of the interval."""
        return self.interval[1]

    @property
    def p_value(self) -> float:
        """The exact two-sided McNemar test of "both rates are equal", from the pairs that disagree."""
        disagreeing = self.only_first + self.only_second
        tail = sum(math.comb(disagreeing, k) for k in range(min(self.only_first, self.only_second) + 1))
        # Integers throughout: 2^-n underflows a float from n = 1075 on.
        return min(1.0, 2 * tail / 2**disagreeing)

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}], {self.n} pairs"


def paired_difference(first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95) -> Difference:
    """Compares two runs outcome by outcome: entry i of both has the same prompt and seed.

    Args:
        first: outcomes of the reference run.
        second: outcomes of the other run, in the same order.
        confidence: of the difference's interval.

    Returns:
        The difference second - first.

    Raises:
        ValueError: if the runs have different lengths or are empty.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} outcomes cannot be paired; use the same prompts and seeds")
    pairs = [(bool(one), bool(other)) for one, other in zip(first, second, strict=True)]
    return Difference(
        both=pairs.count((True, True)),
        only_first=pairs.count((True, False)),
        only_second=pairs.count((False, True)),
        neither=pairs.count((False, False)),
        confidence=confidence,
    )


def plain(measured: Rate | Difference) -> dict[str, float]:
    """Counts, value and limits as plain numbers, for JSON."""
    return {**asdict(measured), "value": measured.value, "low": measured.low, "high": measured.high}
