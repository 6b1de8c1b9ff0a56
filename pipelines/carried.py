"""What a checkpoint brings that only stock pipelines read: it stays on disk, and whole exports carry it on."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sublimate.pipelines.checkpoints import INDEX, weights_files

UNREAD = ("safety_checker", "feature_extractor", "image_encoder")
"""The safety checker, and the image encoder of image prompts, with what prepares pictures for either."""

_RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}
"""Classes that transformers 5 knows by another name alone, with the same files."""
_REQUIRES = "requires_safety_checker"


@dataclass(frozen=True)
class Carried:
    """Components that were left on disk.

    Attributes:
        folder: the checkpoint's.
        entries: (library, class) of each component, as in `model_index.json`.
        variant: of their weights' files.
        requires_checker: what the checkpoint says of `requires_safety_checker`; None where it says nothing.
    """

    folder: Path
    entries: Mapping[str, Sequence[str]]
    variant: str | None = None
    requires_checker: bool | None = None

    def copy_to(self, export: Path) -> None:
        """Adds the components to a saved pipeline, under the plain names of their files.

        Args:
            export: a folder that the pipeline was saved to without them.

        Raises:
            ValueError: when they are gone from where they were.
        """
        index = json.loads((export / INDEX).read_text(encoding="utf-8"))
        for name, (library, kind) in self.entries.items():
            _copy(self.folder / name, export / name, self.variant)
            index[name] = [library, _RENAMED.get(kind, kind)]
        if self.requires_checker is not None:
            index[_REQUIRES] = self.requires_checker
        (export / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def carried(folder: Path, index: Mapping[str, Any], kind: type, variant: str | None = None) -> Carried | None:
    """What of a checkpoint can stay on disk; None for nothing.

    Args:
        folder: a diffusers folder.
        index: its `model_index.json`.
        kind: its pipeline class, which has to call these components optional: AudioLDM 2 does read its extractor.
        variant: of the weights' files.
    """
    optional = getattr(kind, "_optional_components", ())
    entries = {
        name: index[name]
        for name in UNREAD
        if name in optional and isinstance(index.get(name), list) and None not in index[name]
    }
    return Carried(folder, entries, variant, index.get(_REQUIRES)) if entries else None


def without(kind: type, parts: Carried | None) -> dict[str, Any]:
    """Options with which a pipeline class does without these components, and without a warning."""
    if parts is None:
        return {}
    options: dict[str, Any] = dict.fromkeys(parts.entries)
    if "safety_checker" in parts.entries and _REQUIRES in inspect.signature(kind).parameters:
        options[_REQUIRES] = False
    return options


def _copy(source: Path, target: Path, variant: str | None) -> None:
    if not source.is_dir():
        raise ValueError(f"{source} is missing since the checkpoint was opened: get it again, it belongs to exports.")
    mark = "" if variant is None else f".{variant}"
    weights = weights_files(source, variant) if (source / "config.json").is_file() else []
    target.mkdir()
    for path in weights:
        name = path.name.replace(mark, "")
        if path.suffix == ".json":  # which shard holds which tensor
            (target / name).write_text(path.read_text(encoding="utf-8").replace(mark, ""), encoding="utf-8")
        else:
            shutil.copyfile(path, target / name)
    for path in source.glob("*.json"):
        if ".index." not in path.name:
            shutil.copyfile(path, target / path.name)
