"""Fixtures of all tests: tiny checkpoints of every supported family, saved as real folders."""

from __future__ import annotations

from pathlib import Path

import pytest

CHECKPOINTS = (
    "tiny_sd",
    "tiny_sd_v",
    "tiny_inpainting",
    "tiny_upscaling",
    "tiny_unconditional",
    "tiny_edm",
    "tiny_sd3",
    "tiny_audio",
)


def _fixture(name: str):
    @pytest.fixture(scope="session", name=name)
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        # Imported here: the process that only hands out tests needs neither torch nor diffusers.
        from checkpoints import save

        return save(name, tmp_path_factory.mktemp(name))

    return folder


for _name in CHECKPOINTS:
    globals()[_name] = _fixture(_name)
