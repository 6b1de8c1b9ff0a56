"""Networks that training does not run leave the memory: their weights are mapped from a file until they are wanted.

Whatever they were opened from and whatever was edited, the file holds the weights as they are. A parked network stays
usable: on the CPU as it is, its weights being read as they are needed, and on an accelerator within `at_hand`. What it
computes on the CPU may then differ in rounding, since some kernels depend on where in memory a tensor starts.

Layout: `<folder>/encoders-<hash>-<precision>/00000.safetensors, ...`, tensors by "component/parameter", and
`index.json`, which says which file holds which. The folder appears complete or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor, nn

from sublimate.pipelines.folders import written_aside
from sublimate.pipelines.model import Model, weights_hash
from sublimate.pipelines.placement import name_of
from sublimate.pipelines.quantised import has_quantised
from sublimate.training.shards import INDEX, read_mapped


def park(model: Model, names: Sequence[str], folder: Path, *, file_bytes: int) -> None:
    """Takes networks out of memory; their weights keep every bit.

    Args:
        model: whose they are.
        names: its components'; quantised ones stay.
        folder: where the weights' folder lies or will; it must stay as long as the model is used.
        file_bytes: the most a file measures, if one tensor is not larger.

    Raises:
        OSError: when the disk is full or not writable.
    """
    names = [name for name in names if not has_quantised(model.component(name))]
    weights = {f"{name}/{key}": p for name in names for key, p in model.component(name).named_parameters()}
    if not weights:
        return
    # The precision matters too, of which the hash is independent.
    place = folder / f"encoders-{weights_hash(weights.items())[:32]}-{name_of(model.dtype)}"
    if not (place / INDEX).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{place.name}.lock"):
            if not (place / INDEX).is_file():
                _write(weights, place, file_bytes)
    for file in set(json.loads((place / INDEX).read_text()).values()):
        for key, value in read_mapped(place / file).items():
            weights[key].data = value
    for held, name, buffer in _held(model.component(component) for component in names):
        held[name] = buffer.cpu() if not isinstance(buffer, nn.Parameter) else buffer


@contextmanager
def at_hand(model: Model, *names: str) -> Iterator[None]:
    """Within this context networks are where the denoiser is; afterwards where they were.

    Args:
        model: whose they are.
        names: its components'; those that it does not have are ignored.
    """
    modules = [module for name, module in model.components().items() if name in names]
    # Moving a module gives some tensors other values, and puts other tensors in the place of some.
    before = [(held, name, tensor, tensor.data) for held, name, tensor in _held(modules)]
    try:
        for module in modules:
            module.to(model.device)
        yield
    finally:
        for held, name, tensor, value in before:
            tensor.data = value
            held[name] = tensor


def _held(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Every parameter and buffer, with the mapping and the name under which its module holds it."""
    for part in (part for module in modules for part in module.modules()):
        for held in (part._parameters, part._buffers):
            for name, tensor in list(held.items()):
                if tensor is not None:
                    yield held, name, tensor


def _write(weights: Mapping[str, Tensor], place: Path, file_bytes: int) -> None:
    with written_aside(place, INDEX) as aside:
        index: dict[str, str] = {}
        part: dict[str, Tensor] = {}
        for key, value in weights.items():
            if part and sum(held.nbytes for held in part.values()) + value.nbytes > file_bytes:
                _save(part, aside, index)
            part[key] = value.detach().cpu().contiguous()
        _save(part, aside, index)
        (aside / INDEX).write_text(json.dumps(index, indent=1))


def _save(part: dict[str, Tensor], aside: Path, index: dict[str, str]) -> None:
    """Writes what was collected to a file of its own, and forgets it."""
    name = f"{len(set(index.values())):05d}.safetensors"
    save_file(part, aside / name)
    index |= dict.fromkeys(part, name)
    part.clear()
