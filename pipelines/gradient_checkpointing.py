"""Gradient checkpointing: activations are recomputed in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import ModelMixin
from torch import nn

from sublimate.pipelines.model import Model


def enable_gradient_checkpointing(module: nn.Module) -> list[ModelMixin]:
    """Enables it in every network of diffusers within a module; returns those in which it was not enabled before."""
    networks = (part for part in module.modules() if isinstance(part, ModelMixin))
    changed = [n for n in networks if n._supports_gradient_checkpointing and not n.is_gradient_checkpointing]
    for network in changed:
        network.enable_gradient_checkpointing()
    return changed


@contextmanager
def checkpointed(model: Model) -> Iterator[None]:
    """Enables it in every network of diffusers that a model has and that has it, and undoes that afterwards."""
    changed: list[ModelMixin] = []
    try:
        for part in model.components().values():
            changed += enable_gradient_checkpointing(part)
        yield
    finally:
        for network in changed:
            network.disable_gradient_checkpointing()
