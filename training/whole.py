"""Tensors of which each process holds its share, and whole ones: between training (`training/fsdp.py`) and files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is cut along its first dimension, gathered without gradients; any other as it is.

    Every process must take part. `DTensor.full_tensor` is not used: its functional collectives now and then end in a
    segmentation fault over gloo (torch 2.13).
    """
    if not isinstance(tensor, DTensor):
        return tensor
    local, group = tensor.to_local().detach(), tensor.device_mesh.get_group()
    # Shares are as torch.chunk makes them: of one size, but for the last ones, which may be smaller or empty.
    processes, (rows, *rest) = torch.distributed.get_world_size(group), tensor.shape
    size = -(-rows // processes)
    padded = local.new_zeros(size, *rest)
    padded[: len(local)] = local
    found = local.new_empty(processes * size, *rest)
    torch.distributed.all_gather(list(found.chunk(processes)), padded, group=group)
    return found[:rows]


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, if `like` is sharded; no process is asked for anything."""
    if not isinstance(like, DTensor):
        return tensor
    moved = tensor.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def gathered(sections: Mapping[str, Mapping[str, Tensor]], keep: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Sections of whole tensors on the CPU, one section at a time; every process must ask for all of them.

    Args:
        sections: named groups of tensors, sharded or not.
        keep: whether this process wants them; the others get empty sections.
    """
    for section, tensors in sections.items():
        kept = {}
        for name, tensor in tensors.items():
            full = whole(tensor)
            if keep:
                kept[name] = full.detach().cpu()
        yield section, kept
