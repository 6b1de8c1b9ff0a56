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
    """Enables it in every network of diffusers that a model has and that has it, and undoes that afterwards.

    Raises:
        ValueError: when there is none.
    """
    networks = [part for part in model.components().values() if isinstance(part, ModelMixin)]
    if not any(network._supports_gradient_checkpointing for network in networks):
        raise ValueError(f"No network of {model.source} has gradient checkpointing: leave that out.")
    changed: list[ModelMixin] = []
    try:
        for network in networks:
            changed += enable_gradient_checkpointing(network)
        yield
    finally:
        for network in changed:
            network.disable_gradient_checkpointing()
