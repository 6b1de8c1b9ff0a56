"""A hub of folders on this disk, asked through diffusers' own choice of the files to fetch."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusers.loaders import lora_base
from diffusers.pipelines import pipeline_utils
from diffusers.utils import hub_utils
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from sublimate.pipelines import locations

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by id.

    Attributes:
        published: the folder of each.
        cache: where snapshots are put.
        online: whether it answers; what is in the cache is found anyway.
        asked: (id, revision, token) of each file or snapshot that was asked for.
    """

    def __init__(self, published: dict[str, Path], cache: Path, monkeypatch: Any) -> None:
        self.published, self.cache, self.online = published, cache, True
        self.asked: list[tuple[str, str | None, Any]] = []
        for module in (pipeline_utils, locations):
            monkeypatch.setattr(module, "hf_hub_download", self.file)
            monkeypatch.setattr(module, "snapshot_download", self.snapshot)
        monkeypatch.setattr(pipeline_utils, "get_cached_repo_tree", self.listing)
        monkeypatch.setattr(hub_utils, "hf_hub_download", self.file)
        for module in (pipeline_utils, lora_base):
            monkeypatch.setattr(module, "model_info", self.info)

    def info(self, name: str, **_options: Any) -> Any:
        """What the repository holds."""
        if not self.online:
            raise pipeline_utils.OfflineModeIsEnabled("offline")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in self._files(name)])

    def listing(self, name: str, **_options: Any) -> list[Any]:
        """What the repository held when it was last asked."""
        return [SimpleNamespace(path=file) for file in self._files(name)]

    def file(self, name: str, filename: str, *, subfolder: str | None = None, **options: Any) -> str:
        """One file, in the snapshot."""
        self.asked.append((name, options.get("revision"), options.get("token")))
        inside = f"{subfolder}/{filename}" if subfolder else filename
        file, copy = self.published[name] / inside, self._snapshot(name) / inside
        if copy.is_file():
            return str(copy)
        if not self.online or options.get("local_files_only"):
            raise LocalEntryNotFoundError("not in the cache")
        if not file.is_file():
            raise RemoteEntryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
        return str(copy)

    def snapshot(self, name: str, *, allow_patterns: list[str], ignore_patterns: Any = (), **options: Any) -> str:
        """All files of these names."""
        if self.online:
            for file in self._files(name):
                allowed = any(fnmatch(file, pattern) for pattern in allow_patterns)
                if allowed and not any(fnmatch(file, pattern) for pattern in ignore_patterns):
                    self.file(name, file, **options)
        return str(self._snapshot(name))

    def _files(self, name: str) -> list[str]:
        folder = self.published[name]
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    def _snapshot(self, name: str) -> Path:
        return self.cache / name.replace("/", "--") / COMMIT
