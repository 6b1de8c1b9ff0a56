"""Intervals against published worked examples and against their own definitions."""

from __future__ import annotations

import math
import statistics

import pytest

from sublimate.evaluation.intervals import Difference, Mean, Rate, images_needed, paired_difference, wilson


# Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3 (Wilson without continuity correction).
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_limits(hits, n, low, high):
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("hits", "n"), [(3, 40), (17, 40), (0, 25), (25, 25)])
def test_wilson_limits_solve_the_score_equation(hits, n):
    z = statistics.NormalDist().inv_cdf(0.95)
    for limit in wilson(hits, n, confidence=0.9):
        if 0 < limit < 1:
            assert abs(hits / n - limit) == pytest.approx(z * math.sqrt(limit * (1 - limit) / n), rel=1e-12)


def test_no_hits_need_189_trials_to_show_two_percent():
    # At no hits the upper limit is z^2 / (n + z^2), which is 2 % at n = 188.2.
    assert Rate(0, 188).high > 0.02 > Rate(0, 189).high


def test_rate_prints_percent_interval_and_n():
    assert str(Rate(1942, 2000)) == "97.1 % [96.3, 97.7], n=2000"
    assert Rate.of([True, False, True, True]).value == 0.75


@pytest.mark.parametrize(("hits", "n"), [(3, 2), (-1, 4), (0, 0)])
def test_counts_that_are_no_rate_are_refused(hits, n):
    with pytest.raises(ValueError, match=r"is not a rate"):
        Rate(hits, n)


def test_a_confidence_in_percent_is_refused():
    with pytest.raises(ValueError, match=r"95; give a number between 0 and 1"):
        Rate(1, 2, confidence=95)


# Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables (2017), chapter 8: their two data sets.
@pytest.mark.parametrize(
    ("table", "value", "low", "high"),
    [((1, 1, 7, 12), -0.286, -0.507, -0.026), ((59, 6, 16, 80), -0.0621, -0.1186, -0.0046)],
)
def test_paired_difference_gives_the_published_limits(table, value, low, high):
    both, only_second, only_first, neither = table
    difference = Difference(both=both, only_first=only_first, only_second=only_second, neither=neither)
    assert (difference.value, difference.low, difference.high) == pytest.approx((value, low, high), abs=6e-4)


def test_swapping_the_runs_mirrors_the_interval():
    one, other = [True] * 12 + [False] * 8, [True] * 9 + [False] * 9 + [True] * 2
    there, back = paired_difference(one, other), paired_difference(other, one)
    assert (there.both, there.only_first, there.only_second, there.neither) == (9, 3, 2, 6)
    assert (there.low, there.value, there.high) == pytest.approx((-back.high, -back.value, -back.low))


def test_pairing_is_narrower_than_not_pairing():
    agreeing = Difference(both=470, only_first=10, only_second=0, neither=20)
    shuffled = Difference(both=461, only_first=19, only_second=9, neither=11)
    assert agreeing.value == shuffled.value
    assert agreeing.high - agreeing.low < 0.75 * (shuffled.high - shuffled.low)


def test_mcnemar_is_the_binomial_test_on_disagreeing_pairs():
    assert Difference(both=1, only_first=7, only_second=1, neither=12).p_value == pytest.approx(18 / 256)
    assert Difference(both=5, only_first=0, only_second=0, neither=0).p_value == 1.0
    assert Difference(both=0, only_first=4000, only_second=0, neither=0).p_value < 1e-300


def test_runs_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match="3 and 2 outcomes cannot be paired"):
        paired_difference([True] * 3, [True] * 2)
    with pytest.raises(ValueError, match="counts no pairs"):
        paired_difference([], [])


def test_the_ends_are_exact():
    assert {Rate(0, n).low for n in range(1, 500)} == {0.0}
    assert {Rate(n, n).high for n in range(1, 500)} == {1.0}


def test_two_perfect_runs_still_have_a_width():
    perfect = Difference(both=250, only_first=0, only_second=0, neither=0)
    assert perfect.value == 0.0
    assert perfect.high == -perfect.low == pytest.approx(1 - Rate(250, 250).low)


def test_a_mean_knows_how_far_it_would_move():
    mean = Mean.of([1.0, 2.0, 3.0, 6.0])
    assert mean.value == 3.0 and mean.error == pytest.approx((14 / 3) ** 0.5 / 2) and mean.n == 4
    assert str(mean) == "3.0000 +- 1.0801 (n=4)"


@pytest.mark.parametrize(("bar", "least"), [(0.03, 125), (0.02, 189), (0.5, 4)])
def test_the_fewest_images_below_a_bar(bar, least):
    assert images_needed(bar) == least
    assert Rate(0, least).high <= bar < Rate(0, least - 1).high
    assert paired_difference([True] * least, [True] * least).high <= bar
    with pytest.raises(ValueError, match="between 0 and 1"):
        images_needed(0.0)
