"""Requests as files: YAML that is written by hand, with pictures beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sublimate.erasure.request import Request
from sublimate.training.config_files import ConfigError, parse_yaml
from sublimate.training.data import image_files


def read_request(path: str | Path) -> Request:
    """A request from YAML with the fields of `Request` and of its concepts, where texts stand for concepts.

    `images` of a concept are picture files, or one folder of them; relative paths begin where the file lies.

    Raises:
        FileNotFoundError: when there is no such file, or a folder holds no pictures.
        ValueError: when it is no YAML, a field is unknown, or the request contradicts itself, naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no request file {path}: write one in YAML, with what to erase.")
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    try:
        return Request.from_dict(_located(values, path.parent))
    except ConfigError:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _located(values: Any, folder: Path) -> Any:
    """The same values with the paths of all pictures from here."""
    if isinstance(values, Mapping):
        return {
            key: _pictures(value, folder) if key == "images" else _located(value, folder)
            for key, value in values.items()
        }
    return [_located(value, folder) for value in values] if isinstance(values, list) else values


def _pictures(given: Any, folder: Path) -> Any:
    if isinstance(given, str):
        found = folder / given
        return [str(file) for file in (image_files(found) if found.is_dir() else (found,))]
    if isinstance(given, Iterable) and all(isinstance(file, str) for file in given):
        return [str(folder / file) for file in given]
    return given  # refused with all that is no text
