"""Fixtures of all tests: tiny checkpoints of every supported family, saved as real folders."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from checkpoints import modules, save

QUICK = frozenset(f"tiny_{name}" for name in ("sd", "unconditional"))
"""The checkpoints of the quick suite: tests of any other are slow."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    others = modules().keys() - QUICK
    for item in items:
        callspec = getattr(item, "callspec", None)
        values = () if callspec is None else (v for v in callspec.params.values() if isinstance(v, str))
        if others & {*getattr(item, "fixturenames", ()), *(value.split("#")[0].split("@")[0] for value in values)}:
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    gc.freeze()  # what imports made stays: collections need not look through it again and again


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families", default="", help="what the property matrices run on: names with commas, or all")


def _fixture(name: str):
    @pytest.fixture(scope="session", name=name)
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return save(name, tmp_path_factory.mktemp(name))

    return folder


for _name in modules():
    globals()[_name] = _fixture(_name)
