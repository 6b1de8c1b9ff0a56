"""Whether an opened pipeline has all parts of its family, and all weights of its parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sublimate.pipelines.checkpoints import check_safetensors, weights_files
from sublimate.pipelines.quantised import has_quantised


def check_loaded(pipeline: Any, source: Path, variant: str | None = None, read: Iterable[str] = ()) -> None:
    """Makes sure that every weight came from the checkpoint: what lacks one is otherwise drawn at random, or empty.

    Args:
        pipeline: opened from `source`.
        source: a folder, or one file.
        variant: of the weights' files.
        read: components of transformers whose files are compared with them by name.

    Raises:
        ValueError: naming the first weight that is missing.
    """
    for name, module in pipeline.components.items():
        if not isinstance(module, nn.Module):
            continue
        lacking = unfilled(module)
        if name in read and isinstance(module, PreTrainedModel) and source.is_dir() and not has_quantised(module):
            files = [path for path in weights_files(source / name, variant) if path.suffix != ".json"]
            lacking += _absent(module, [key for path in files for key in check_safetensors(path)])
        if lacking:
            raise ValueError(f"The {name} of {source} lacks {lacking[0]}: get the checkpoint again.")


def unfilled(module: nn.Module) -> list[str]:
    """The parameters that loading left without values."""
    return [name for name, parameter in module.named_parameters() if parameter.is_meta]


def _absent(module: nn.Module, saved: list[str]) -> list[str]:
    """Parameters that no name in a file stands for; versions of transformers differ in what stands before a name."""
    whole, ends = set(saved), {end for name in saved for end in _ends(name)}
    aliases: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    return [
        names[0]
        for names in aliases.values()
        if not any(name in ends or any(end in whole for end in _ends(name)) for name in names)
    ]


def _ends(name: str) -> Iterator[str]:
    """A dotted name, and what is left of it without its first parts, down to two."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(max(1, len(parts) - 1)))
