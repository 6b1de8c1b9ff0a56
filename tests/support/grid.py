"""Which families the property matrices run on, and which families methods say they do not fit."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from checkpoints import modules

from sublimate.pipelines.model import Model, open_model


def rows(
    metafunc: pytest.Metafunc, cases: Mapping[str, tuple[str, Any]], families: Mapping[str, Sequence[str]]
) -> list[Any]:
    """Pairs (case, family) of a matrix: all cases on their first family, on others those that bear a method's name.

    These on the first family make the quick suite. A test marked `first_family` sees what no family changes, and has
    no others. `--families` names what all cases of all tests run on instead.

    Args:
        metafunc: the test, as pytest knows it.
        cases: (method, options) by name.
        families: names of tiny checkpoints by method; "" stands for all other methods.
    """
    asked, found = metafunc.config.getoption("--families"), []
    named = tuple(modules()) if asked == "all" else tuple(asked.split(",")) if asked else ()
    alone = metafunc.definition.get_closest_marker("first_family") is not None
    for case, (method, _) in cases.items():
        own = families.get(method, families[""])
        for family in named or (own if case == method and not alone else own[:1]):
            slow = [] if case == method and family == own[0] else [pytest.mark.slow]
            found.append(pytest.param(case, family, marks=slow, id=f"{case}-{family}"))
    return found


def matrix(name: str) -> Any:
    """A matrix's own module, "training/test_objectives", for what runs its rows elsewhere."""
    path = Path(__file__).parents[1] / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def opened(folder: Path) -> Model:
    """A checkpoint for all tests of a process that leave it as it was; to change it is what they are to find."""
    return open_model(folder)


NUMBERED = ("cat", "dog", "seven", "red", "red cat", "a dog")
"""What the classes without names are taken for."""


def called(model: Model, *words: str) -> list[str]:
    """What a model calls some things: their words, or numbers where it has classes without names."""
    if model.backbone.text_components or model.null_condition():
        return list(words)
    return [str(NUMBERED.index(word)) for word in words]


@contextmanager
def refusals(*reasons: str):
    """Skips, and so says, what is refused with one of the reasons; any other error is a failure."""
    try:
        yield
    except ValueError as refusal:
        if not any(reason in str(refusal) for reason in reasons):
            raise
        pytest.skip(str(refusal))
