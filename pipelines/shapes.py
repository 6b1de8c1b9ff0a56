"""Checkpoints without their weights: every tensor has a shape and a precision, and no storage."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import PreTrainedModel

from sublimate.pipelines.backbones.base import backbone_for
from sublimate.pipelines.carried import carried, without
from sublimate.pipelines.checkpoints import INDEX, read_json
from sublimate.pipelines.locations import DEFAULTS_FILE, checkpoint_folder
from sublimate.pipelines.model import Model
from sublimate.pipelines.progress import without_bars
from sublimate.pipelines.quantised import precision_of


class Shapes(FakeTensorMode):
    """What tensors without storage belong to; beside tensors with values, they make more of their kind."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shapes:
        # Copied along with a tensor, it would free weak references to storages that are the original's.
        return self


class NoShapes(ValueError):
    """A checkpoint is there, but its shapes cannot be known before it is opened."""


def open_shapes(source: str | Path, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Model:
    """Opens a checkpoint's shapes: what a run would cost can be counted before anything large is read or downloaded.

    The weights are torch's fake tensors: operations with them give fake tensors, at once, whatever their
    size. Of a hub id only the configurations and tokenizers are fetched.

    Args:
        source: a diffusers folder, the name of a packaged model, or a hub id.
        revision: branch, tag or commit of a hub id.
        dtype: precision of all weights.

    Raises:
        NoShapes: when it is one file, which holds no configuration, or quantised.
        ValueError: when the checkpoint is missing or of an unknown family.
    """
    if Path(source).is_file():
        raise NoShapes(f"{source} is one file, whose shapes cannot be known without opening it: give a folder.")
    folder = checkpoint_folder(source, revision=revision, weights=False)
    index = read_json(folder / INDEX)
    kind = str(index.get("_class_name"))
    backbone = backbone_for(kind)
    cls = getattr(diffusers, kind)
    absent = without(cls, carried(folder, index, cls))
    mode = Shapes()
    with without_bars():
        # Components are [library, class]; anything else is an option of the pipeline's.
        components = {
            name: _component(mode, folder / name, *value) if isinstance(value, list) else value
            for name, value in index.items()
            if not name.startswith("_") and name not in absent
        }
    pipeline = cls(**components, **absent)
    file = folder / DEFAULTS_FILE
    defaults = read_json(file) if file.is_file() else backbone.published_defaults(pipeline)
    return in_precision(Model(pipeline, str(source), defaults), dtype)


def in_precision(shapes: Model, dtype: torch.dtype) -> Model:
    """As `Model.to(dtype=...)`, for a model without storage: its tensors cannot change in place and are replaced."""
    cast: dict[int, nn.Parameter] = {}
    everywhere = ((net, at, module) for net in shapes.components().values() for at, module in net.named_modules())
    for network, at, module in everywhere:
        for key, parameter in module._parameters.items():
            precision = precision_of(network, f"{at}.{key}", dtype)
            if parameter is not None and parameter.dtype != precision:
                if id(parameter) not in cast:  # some are held by two modules
                    cast[id(parameter)] = nn.Parameter(parameter.detach().to(precision), requires_grad=False)
                module._parameters[key] = cast[id(parameter)]
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[key] = buffer.to(precision_of(network, f"{at}.{key}", dtype))
    return shapes


def _component(mode: Shapes, folder: Path, library: str | None, name: str | None) -> Any:
    if library is None or name is None:
        return None
    # A pipeline's own classes are recorded by the name of its folder in diffusers.
    own = getattr(diffusers.pipelines, library, None)
    cls = getattr(own if own is not None else importlib.import_module(library), name)
    if not issubclass(cls, nn.Module):
        return cls.from_pretrained(folder)
    if "quantization_config" in read_json(folder / "config.json"):
        raise NoShapes(f"{folder} is quantised, and its configuration does not say how large that makes it.")
    if issubclass(cls, ModelMixin):
        return _without_values(cls.from_config, cls.load_config(folder), mode)
    if issubclass(cls, PreTrainedModel):
        return _without_values(cls, cls.config_class.from_pretrained(folder), mode)
    raise NoShapes(f"{folder} is a {name}, of which no shapes can be made without its weights.")


def _without_values(make: Callable[[Any], nn.Module], config: Any, mode: Shapes) -> nn.Module:
    try:
        with mode:
            return make(config)
    except DataDependentOutputException:  # some compute with values while they are made: those values go afterwards
        network = make(config)
    for module in network.modules():
        for key, parameter in module._parameters.items():
            module._parameters[key] = None if parameter is None else nn.Parameter(mode.from_tensor(parameter.detach()))
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else mode.from_tensor(buffer)
    return network
