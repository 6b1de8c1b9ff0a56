"""Checkpoints: tensors in safetensors and facts in JSON, complete under their final name or not there at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sublimate.pipelines.folders import written_aside
from sublimate.training.whole import share

PREFIX = "checkpoint-"
_NUMBER = ".number"


def write_checkpoint(
    folder: Path,
    step: int,
    sections: Iterable[tuple[str, Mapping[str, Tensor]]],
    facts: Mapping[str, Any],
    limit: int | None,
) -> Path:
    """Writes `checkpoint-{step}` aside, syncs it to disk, renames it into place, then drops the oldest over `limit`.

    Args:
        folder: the run's output folder.
        step: finished training steps.
        sections: named groups of whole tensors, one safetensors file each; asked for one after the other.
        facts: JSON-serialisable facts.
        limit: how many checkpoints to keep; None keeps all.

    Raises:
        OSError: when the disk is full or not writable; earlier checkpoints are then untouched.
    """
    # A process that was killed while writing leaves its half behind.
    for half in folder.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(half, ignore_errors=True)
    final = folder / f"{PREFIX}{step}"
    with written_aside(final, "state.json") as aside:
        for name, tensors in sections:
            save_file(_apart(tensors), aside / f"{name}.safetensors")
        (aside / "state.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
    if limit is not None:
        for old in checkpoints(folder)[:-limit]:
            shutil.rmtree(old)
    return final


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as `save_file` takes them, contiguous and without shared memory; only those that are not are copied."""
    found = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    storages = Counter(tensor.untyped_storage().data_ptr() for tensor in found.values())
    return {key: t.clone() if storages[t.untyped_storage().data_ptr()] > 1 else t for key, t in found.items()}


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def refuse_later(folder: Path, step: int) -> None:
    """Refuses to start at a step from which the folder's later checkpoints would be taken for the run's newest.

    Raises:
        ValueError: when there are some.
    """
    if later := [path.name for path in checkpoints(folder) if int(path.name.removeprefix(PREFIX)) > step]:
        raise ValueError(
            f"{folder} holds {', '.join(later)} of a run that went beyond step {step}, where this one starts: "
            "resume from the latest, delete what is later, or choose another output_dir."
        )


def find_checkpoint(folder: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: None, the newest ("latest", None when there is none), or a named folder.

    Raises:
        FileNotFoundError: when a named checkpoint does not exist.
    """
    if wanted is None:
        return None
    if wanted == "latest":
        found = checkpoints(folder)
        return found[-1] if found else None
    for path in (Path(wanted), folder / wanted):
        if path.is_dir():
            return path
    raise FileNotFoundError(f"There is no checkpoint {wanted}; `latest` resumes from the newest in {folder}.")


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The sections and facts of a checkpoint.

    Raises:
        ValueError: when the checkpoint is damaged.
    """
    try:
        facts = json.loads((path / "state.json").read_text())
        sections = {name: load_file(path / f"{name}.safetensors") for name in facts["sections"]}
    except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(
            f"The checkpoint {path} is damaged ({error}): delete it to resume from the one before it."
        ) from error
    return sections, facts


def fingerprint(*parts: object) -> str:
    """SHA-256 of values that JSON can hold: what must be the same for a checkpoint to belong to a run."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def lasting(options: object) -> object:
    """Options without the optimisers', which a resumed run may change."""
    if not isinstance(options, dict):
        return options
    return {k: lasting(v) for k, v in options.items() if k != "learning_rate" and not k.startswith("adam_")}


def load_exactly(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], what: str) -> None:
    """Copies tensors, or this process's shares, into the parameters of the same names, which must match one to one.

    Args:
        parameters: of the run.
        tensors: whole ones.
        what: whose they are, for messages: "The checkpoint's player student".

    Raises:
        ValueError: when names or shapes differ.
    """
    if parameters.keys() != tensors.keys():
        differing = sorted(parameters.keys() ^ tensors.keys())
        raise ValueError(f"{what} does not fit this run: {len(differing)} names differ, e.g. {differing[0]}.")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(
                f"{what} does not fit this run: {name} has shape {tuple(tensors[name].shape)}, the run needs "
                f"{tuple(parameter.shape)}."
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(share(tensors[name], parameter))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's per-parameter state as named tensors, `{index}.{name}`, of numbers `{index}.{name}.number`."""
    named = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            key = f"{index}.{name}" if isinstance(value, Tensor) else f"{index}.{name}{_NUMBER}"
            named[key] = torch.as_tensor(value)
    return named


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restores whole `optimizer_tensors` in their own precision; of sharded parameters' moments, this process's share.

    `Optimizer.load_state_dict` would make floats of integers.
    """
    owners = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.state.clear()
    for name, tensor in tensors.items():
        index, _, field = name.partition(".")
        parameter, group = owners[int(index)]
        if field.endswith(_NUMBER):
            optimizer.state[parameter][field.removesuffix(_NUMBER)] = tensor.item()
        elif field == "step":  # torch's own optimisers count steps on the CPU, unless one kernel does all of a step
            optimizer.state[parameter][field] = tensor.to(parameter.device if group.get("fused") else "cpu", copy=True)
        else:
            moment = share(tensor, parameter).to(parameter.device)
            if moment.shape == parameter.shape and not isinstance(moment, DTensor):
                # One kernel updates all only where moments lie in memory as their weights do.
                moment = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)
            optimizer.state[parameter][field] = moment
