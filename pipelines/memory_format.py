"""Convolutions with channels last: how tensor cores, and CPUs, read pictures without rearranging them first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sublimate.pipelines.model import Model


@contextmanager
def channels_last(model: Model) -> Iterator[None]:
    """Stores the kernels of a model's convolutions with channels last within this context; copies keep the order.

    What a network computes is the same to rounding: activations take the order of the kernels that they meet, until
    one of diffusers' transformer blocks puts theirs back.

    Args:
        model: its network, and its autoencoder where that has kernels too.

    Raises:
        ValueError: for a network without convolutions, but for those that cut pictures into patches.
    """
    if not kernels(model.denoiser):
        raise ValueError(f"The network of {model.source} is no network of convolutions: leave out channels_last.")
    changed: list[Tensor] = []
    try:
        for part in model.components().values():
            for weight in kernels(part) if isinstance(part, nn.Module) else ():
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
                changed.append(weight)
        yield
    finally:
        for weight in changed:
            weight.data = weight.data.contiguous()


def kernels(network: nn.Module) -> list[Tensor]:
    """The weights of convolutions over neighbouring pixels: not those that see one at a time, or each one once."""
    convolutions = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    return [c.weight for c in convolutions if c.kernel_size != (1, 1) and c.kernel_size != c.stride]
