"""Where a checkpoint lies: a folder on disk, in this package, or fetched from the hub."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import diffusers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sublimate.pipelines.cards import CARD_FILE, is_hub_id
from sublimate.pipelines.checkpoints import refuse_pickle

DEFAULTS_FILE = "sublimate.json"
"""Beside `model_index.json`: how a checkpoint wants to be sampled, and where it comes from."""

SCHEDULER_FILE = "scheduler/scheduler_config.json"


def checkpoint_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    weights: bool = True,
) -> Path:
    """The folder on disk that a source stands for, downloaded if need be.

    Args:
        source, revision, variant, token: as in `open_model`.
        weights: download the weights too, not only what describes them.

    Raises:
        ValueError: when there is no such checkpoint.
    """
    path, name = Path(source).expanduser(), str(source)
    packaged = packaged_folder(name)
    local = path if path.is_dir() and ((path / "model_index.json").exists() or packaged is None) else packaged
    if local is not None:
        if revision:
            raise ValueError(f"{name} is a local folder: it has no revision {revision!r}.")
        return local
    refuse_pickle(path)
    if not is_hub_id(name) or path.suffix == ".safetensors":
        raise ValueError(
            f"There is no checkpoint {name}: give a diffusers folder, a .safetensors file, a hub id like owner/name "
            f"or the name of a packaged model ({', '.join(packaged_names()) or 'none is installed'})."
        )
    return _download(name, revision, variant, token) if weights else _download_descriptions(name, revision, token)


def lora_folder(source: str | Path, *, token: str | bool | None = None) -> Path:
    """The folder that tells how the student of a LoRA is sampled: its own, or what the hub has beside its weights.

    Args:
        source, token: as `fuse_lora` takes them.

    Raises:
        ValueError: when the hub does not answer.
    """
    path, name = Path(source).expanduser(), str(source)
    if path.exists() or not is_hub_id(name):
        return path
    found = _described(name, None, token, DEFAULTS_FILE)
    # Of one commit, whatever the branch moves to meanwhile.
    return path if found is None else _described(name, found.name, token, SCHEDULER_FILE) or found


def packaged_names() -> list[str]:
    """The models that come with the library."""
    assets = Path(str(importlib.resources.files("sublimate.assets")))
    return sorted(path.parent.name for path in assets.glob("*/model_index.json"))


def packaged_folder(name: str) -> Path | None:
    """Where a model of that name lies in this package; None when there is none."""
    return Path(str(importlib.resources.files("sublimate.assets"))) / name if name in packaged_names() else None


def _download(name: str, revision: str | None, variant: str | None, token: str | bool | None) -> Path:
    try:
        folder = Path(
            diffusers.DiffusionPipeline.download(
                name, revision=revision, variant=variant, token=token, use_safetensors=True
            )
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(_hub_problem(name, revision, error)) from error
    # diffusers leaves out what no component needs. A snapshot is named as its commit.
    for file in (DEFAULTS_FILE, CARD_FILE):
        _described(name, folder.name, token, file)
    return folder


def _described(name: str, revision: str | None, token: str | bool | None, file: str) -> Path | None:
    """Fetches one file of a repository that need not have it; the snapshot's folder, None where there is none."""
    try:
        found = Path(hf_hub_download(name, file, revision=revision, token=token))
    except EntryNotFoundError:
        # Not in the repository, or offline and not in the cache.
        return None
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(_hub_problem(name, revision, error)) from error
    return found.parents[file.count("/")]


def _download_descriptions(name: str, revision: str | None, token: str | bool | None) -> Path:
    """Configurations and tokenizers alone."""
    files = ["*.json", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=files))
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(_hub_problem(name, revision, error)) from error


def _hub_problem(name: str, revision: str | None, error: Exception) -> str:
    """What went wrong with the hub, in one sentence."""
    # diffusers tries its cache when the hub does not answer, and keeps the reason as the cause.
    cause = error.__cause__ or error
    if isinstance(cause, GatedRepoError):
        return f"{name} is gated: accept its terms on the hub and pass your token."
    if isinstance(cause, RevisionNotFoundError):
        return f"{name} has no revision {revision!r} on the hub."
    if isinstance(cause, RepositoryNotFoundError):
        return f"The hub has no model {name}, or it is private: check the name, or pass your token."
    if isinstance(cause, ConnectionError | HTTPError) and not isinstance(cause, HfHubHTTPError):
        return (
            f"The hub cannot be reached and {name} is not in its cache: check the connection, or give a local folder."
        )
    if "safetensors" in str(error):
        return (
            f"{name} offers its weights as pickles only, or not in this variant: convert them with "
            "pipeline.save_pretrained(folder, safe_serialization=True) in an environment you trust."
        )
    return f"{name} cannot be fetched from the hub ({first_line(cause)})"


def first_line(error: BaseException) -> str:
    """What an error says, without the details that follow."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
