"""Classes as prompts: names, synonyms, numbers, and what names no class."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from diffusers import DiTPipeline

from sublimate.pipelines.classes import class_names, read_classes

ID2LABEL = {"0": "tench, Tinca tinca", "1": "crane, bird", "2": "crane, machine", "3": "7", "7": "golden retriever"}
NAMES = class_names(SimpleNamespace(config={"id2label": ID2LABEL}))


@pytest.mark.parametrize(
    ("prompt", "number"),
    [
        ("tench", 0),
        ("Tinca Tinca", 0),
        ("tench, tinca tinca", 0),
        (" golden retriever ", 7),
        ("crane, bird", 1),
        ("machine", 2),
        ("7", 3),  # a name comes before a number
        ("8", 8),
        ("008", 8),
        ("", 10),
        (" ", 10),
    ],
)
def test_a_class_has_names_and_a_number(prompt, number):
    assert read_classes([prompt], NAMES, 10, null=10) == [number]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "golden retreiver",
            r"classes, from 0 to 9, not 'golden retreiver': did you mean 'golden",
        ),
        ("tench, zebra", "not 'tench, zebra': did you mean 'tench'"),
        ("zzz", r"not 'zzz'\.$"),
        ("10", r"from 0 to 9, not '10'\.$"),
        ("-1", r"not '-1'\.$"),
        ("²", r"not '²'\.$"),
        ("crane", "'crane' names the classes 1, 2: give one of the numbers"),
        ("tench, bird", "'tench, bird' names the classes 0, 1"),
    ],
)
def test_what_names_no_class_or_several_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        read_classes(["tench", prompt], NAMES, 10, null=10)


def test_without_names_there_are_numbers_and_without_null_always_a_class():
    assert read_classes(["3", "0"], {}, 4) == [3, 0]
    with pytest.raises(ValueError, match="class numbers from 0 to 3, not 'cat'"):
        read_classes(["cat"], {}, 4)
    with pytest.raises(ValueError, match="no class for no class: its prompts are class numbers from 0 to 3, not ''"):
        read_classes([""], {}, 4)


def test_a_list_of_classes_is_asked_for():
    with pytest.raises(TypeError, match="list of prompts"):
        read_classes("3", {}, 4)
    with pytest.raises(ValueError, match="at least one class"):
        read_classes([], {}, 4)


def test_names_are_those_of_the_stock_pipeline(tiny_dit):
    pipeline = DiTPipeline.from_pretrained(tiny_dit)
    names = class_names(pipeline)
    assert pipeline.labels
    for name, number in pipeline.labels.items():
        assert number in names[name.casefold()]
