"""What names a LoRA: a file, a folder or a hub id, which of its files, and how much of it is added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import list_repo_files
from huggingface_hub.errors import HTTPError

from sublimate.pipelines.cards import is_hub_id, public_name
from sublimate.pipelines.checkpoints import refuse_pickle

LORA_FILE = "pytorch_lora_weights.safetensors"
# What diffusers too takes for no LoRA.
_OTHERS = ("scheduler", "optimizer", "checkpoint")


@dataclass(frozen=True)
class LoraSource:
    """A LoRA as users name it: `SOURCE`, `SOURCE:FILE`, and `@SCALE` behind either.

    Attributes:
        place: a file, a folder or a hub id.
        file: one of several files of a folder or of a hub repository; None where it is not said.
        scale: what its change of the weights is multiplied by.
    """

    place: str
    file: str | None = None
    scale: float = 1.0

    @classmethod
    def read(cls, given: str | Path) -> LoraSource:
        """A name taken apart; what exists on disk under the whole name is that.

        Raises:
            ValueError: for a scale that is no finite number.
        """
        name = str(given)
        if _exists(name):
            return cls(name)
        head, at, tail = name.rpartition("@")
        scale = 1.0
        if at and "/" not in tail and not tail.endswith(".safetensors"):
            scale, name = _number(head, tail), head
        if _exists(name):
            return cls(name, None, scale)
        place, colon, file = name.rpartition(":")
        if colon and (_exists(place) or is_hub_id(place)):
            return cls(place, file, scale)
        return cls(name, None, scale)

    @property
    def path(self) -> Path:
        """Where it lies, if that is on this disk."""
        place = Path(self.place).expanduser()
        return place if self.file is None else place / self.file

    def found(self, token: str | bool | None) -> tuple[str, str | None]:
        """A file on disk, or a hub id and the file there.

        Args:
            token: for gated or private repositories of the hub.

        Raises:
            ValueError: for a pickle, where there is none, and where several files could be meant.
        """
        path = self.path
        refuse_pickle(path)
        if path.is_dir():
            path /= self._chosen([one.name for one in path.iterdir()]) or LORA_FILE
        if path.is_file():
            return str(path), None
        if not is_hub_id(self.place) or self.place.endswith(".safetensors"):
            raise ValueError(f"{path} cannot be opened as a LoRA: there is no such file.")
        if self.file is not None:
            return self.place, self.file
        try:
            names = list_repo_files(self.place, token=token)
        except (HTTPError, OSError, ValueError):  # perhaps it is in the cache; else its download says what is wrong
            names = []
        return self.place, self._chosen(names) or LORA_FILE

    def _chosen(self, names: Sequence[str]) -> str | None:
        """The one LoRA among a repository's or a folder's files, if there is any."""
        files = sorted(n for n in names if n.endswith(".safetensors") and not any(other in n for other in _OTHERS))
        if LORA_FILE in files:
            return LORA_FILE
        if len(files) > 1:
            raise ValueError(f"{self.place} holds {', '.join(files)}: say which, as {self.place}:{files[0]}.")
        return files[0] if files else None


def public_lora(given: str) -> str:
    """What to call a LoRA in public, as `public_name` does; file and scale as they were given."""
    place = LoraSource.read(given).place
    return public_name(place) + given[len(place) :]


def _exists(name: str) -> bool:
    return bool(name) and Path(name).expanduser().exists()


def _number(source: str, text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise ValueError(f"The scale of the LoRA {source} is {text!r}: give a number, as {source}@0.7.")
    return scale
