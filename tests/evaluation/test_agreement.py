"""Prompt accuracy on pictures whose content is known."""

from __future__ import annotations

import pytest
import torch

from sublimate.evaluation.agreement import agreement, check_label, read
from sublimate.evaluation.intervals import Rate

SHOWN = [
    {"digit": "one", "ink": "red"},
    {"digit": "two", "ink": "green"},
    {"digit": "seven", "ink": "blue"},
    {"digit": None, "ink": "red"},  # no digit at all
    {"digit": "zero", "ink": "red"},
]


def test_only_mentioned_groups_count(palette):
    asked = [{"digit": "one"}, {"digit": "one", "ink": "green"}, {"ink": "red"}, {"digit": "seven", "ink": None}, {}]
    result = agreement(palette, palette.paint(SHOWN), asked)
    assert result.groups == {"digit": Rate(1, 3), "ink": Rate(1, 2)}
    assert result.together == Rate(1, 4)
    assert result.rejected == Rate(1, 5)


def test_a_group_that_no_prompt_mentions_has_no_rate(palette):
    result = agreement(palette, palette.paint(SHOWN), [{"ink": wanted["ink"]} for wanted in SHOWN])
    assert result.groups == {"ink": Rate(5, 5)} and result.together == Rate(5, 5)


def test_batches_change_nothing(palette):
    images = palette.paint(SHOWN)
    asked = [{"digit": "two", "ink": "red"}] * 5
    assert agreement(palette, images, asked, batch_size=2) == agreement(palette, images, asked)


def test_readings_name_and_count_what_is_seen(palette):
    readings = read(palette, palette.paint(SHOWN).requires_grad_())
    assert len(readings) == 5
    assert readings.shows("ink", "red").tolist() == [True, False, False, True, True]
    assert readings.rejected().tolist() == [False, False, False, True, False]
    assert readings.counts("ink") == {"red": 3, "green": 1, "blue": 1, "none of them": 0}
    where = torch.tensor([False, False, True, True, False])
    assert readings.counts("digit", where) == {"seven": 1, "none of them": 1, "zero": 0, "one": 0, "two": 0}
    assert next(iter(readings.counts("ink"))) == "red"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ([{"digit": "nine"}] * 5, "no digit 'nine'; it knows zero, one, two, seven"),
        ([{"style": "neon"}] * 5, "no group 'style'; it knows digit, ink"),
        ([{"digit": "one"}] * 4, "4 expectations for 5 images"),
        ([{}] * 5, "no prompt mentions anything"),
    ],
)
def test_expectations_that_cannot_be_judged_are_refused(palette, asked, sentence):
    with pytest.raises(ValueError, match=sentence):
        agreement(palette, palette.paint(SHOWN), asked)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_refused(palette, value):
    images = palette.paint(SHOWN)
    images[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match="1 of 5 images are not finite"):
        read(palette, images)


def test_no_images_are_refused(palette):
    with pytest.raises(ValueError, match="no image to read"):
        read(palette, torch.zeros(0, 3, 2, 2))


def test_among_very_many_labels_those_alike_are_named():
    labels = (*(f"thing {index}" for index in range(1000)), "tench, Tinca tinca")
    with pytest.raises(ValueError, match=r"it knows 1001 labels, among them tench, Tinca tinca$"):
        check_label({"class": labels}, "class", "Tench")
    with pytest.raises(ValueError, match="among them tench, Tinca tinca"):
        check_label({"class": labels}, "class", "tinca tenca")
    with pytest.raises(ValueError, match=r"knows 1001 labels$"):
        check_label({"class": labels}, "class", "zzz")
