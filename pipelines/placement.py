"""Moving networks only where they have to move."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

M = TypeVar("M", bound=nn.Module)


def without_storage(module: nn.Module) -> bool:
    """Whether a network has shapes alone (`sublimate.pipelines.shapes`)."""
    return any(isinstance(parameter, FakeTensor) for parameter in module.parameters())


def placed(module: M, device: torch.device, dtype: torch.dtype | None = None) -> M:
    """`module.to(device, dtype)`, which torch refuses shapes without storage even where nothing would change."""
    if any(p.device != device or p.dtype != (dtype or p.dtype) for p in module.parameters()):
        module.to(device, dtype)
    return module


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; on its way from the CPU to a GPU nobody waits for it."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def brought_to(function: object, tensor: Tensor) -> Tensor:
    """A tensor where a network's weights are, for a network or one of its methods; where it is, for anything else."""
    owner = getattr(function, "__self__", function)
    parameter = next(owner.parameters(), None) if isinstance(owner, nn.Module) else None
    return tensor if parameter is None else tensor.to(parameter.device)


def name_of(dtype: torch.dtype) -> str:
    """A precision's name as options have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
