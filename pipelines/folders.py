"""Folders and files that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(folder: Path, marker: str) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` once this context ends well.

    It lies in the same parent, is synced to the disk and then renamed. An earlier export is removed only after the new
    one has its name; when anything fails, what was there before is there again.

    Args:
        folder: where the files shall end up.
        marker: a file that every earlier export holds: a folder without it is somebody's and is not replaced.

    Yields:
        the empty temporary folder to write to.

    Raises:
        ValueError: when `folder` exists and is neither empty nor an earlier export.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and not (folder.is_dir() and ((folder / marker).is_file() or not any(folder.iterdir()))):
        raise ValueError(f"{folder} exists and holds something else: choose another folder, or move it away.")
    aside = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    earlier = folder.parent / f".{folder.name}.{os.getpid()}.earlier"
    # Left by a process of the same number that was killed.
    shutil.rmtree(aside, ignore_errors=True)
    if earlier.exists() and not folder.exists():
        earlier.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            _sync(path)
        if folder.exists():
            folder.rename(earlier)
        try:
            aside.rename(folder)
        except BaseException:
            if earlier.exists():
                earlier.rename(folder)
            raise
        _sync(folder.parent)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def file_written_aside(path: Path) -> Iterator[Path]:
    """A path in the same folder, whose file takes the place of `path` once this context ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        yield aside
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
