"""Which families the property matrices run on, and which families methods say they do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from checkpoints import modules

from sublimate.pipelines.model import Model


def families(config: pytest.Config, defaults: Sequence[Any]) -> list[Any]:
    """The matrix's own choice, or what `--families` names: then slow tests are meant, whatever they are marked as."""
    asked = config.getoption("--families")
    if not asked:
        return list(defaults)
    return list(modules()) if asked == "all" else asked.split(",")


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
