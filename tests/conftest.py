"""Fixtures of all tests: tiny checkpoints of every supported family, saved as real folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import modules, save


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families", default="", help="what the property matrices run on: names with commas, or all")


def _fixture(name: str):
    @pytest.fixture(scope="session", name=name)
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return save(name, tmp_path_factory.mktemp(name))

    return folder


for _name in modules():
    globals()[_name] = _fixture(_name)
