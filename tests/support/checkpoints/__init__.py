"""Tiny checkpoints of every supported family: real diffusers and transformers classes, random weights.

One file per family. Each of its functions `tiny_…` builds one checkpoint; the fixture of that name is its folder.
"""

from __future__ import annotations

import importlib
import re
import zlib
from pathlib import Path


def modules() -> dict[str, str]:
    """The module that builds each checkpoint; read from the files, so that nothing heavy is imported to know it."""
    return {
        name: f"checkpoints.{path.stem}"
        for path in sorted(Path(__file__).parent.glob("*.py"))
        for name in re.findall(r"^def (tiny_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


def save(name: str, folder: Path) -> Path:
    """Builds a checkpoint with a seed of its own, without touching the global random state, and saves it."""
    import torch

    build = getattr(importlib.import_module(modules()[name]), name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        pipeline = build()
    pipeline.save_pretrained(folder)
    return folder
