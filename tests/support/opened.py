"""Tiny checkpoints as open models, opened when a test first asks for one."""

from __future__ import annotations

import pytest

from sublimate.pipelines.model import Model, open_model


class Opened(dict[str, Model]):
    """Name of a checkpoint's fixture -> its model, opened once.

    Args:
        request: of the fixture that lives as long as the models shall.
    """

    def __init__(self, request: pytest.FixtureRequest) -> None:
        super().__init__()
        self._request = request

    def __missing__(self, name: str) -> Model:
        self[name] = open_model(self._request.getfixturevalue(name))
        return self[name]
