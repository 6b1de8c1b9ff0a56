"""Tensors of which each process holds its share, and whole ones: between training (`training/fsdp.py`) and files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, which every process must take part in; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
