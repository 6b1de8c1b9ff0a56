"""The gradients of a turn: averaged over processes, and clipped by their norm, sharded or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Mean over processes in one message; explicit, so that it also holds for losses DDP's hooks cannot see.

    Parameters without a gradient get zeros. Those of sharded players are averaged already, as they were cut.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if not gradients:
        return
    mean = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients, sharded ones among them, so that their L2 norm is at most `max_norm`; returns what it was."""
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain if p.grad is not None])
    if sharded:
        shares = [p.grad.to_local() for p in sharded if isinstance(p.grad, DTensor)]
        squared = torch.nn.utils.get_total_norm(shares).square()
        torch.distributed.all_reduce(squared, group=sharded[0].device_mesh.get_group())
        norm = (squared + norm.to(squared).square()).sqrt()
    for group in (plain, sharded):
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
