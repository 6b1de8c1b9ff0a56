"""Which weights matter most: a mask of the largest magnitudes over many tensors, without sorting them together."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def largest(magnitudes: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks of the entries that are at least as large as the share's smallest, over all tensors together.

    Bits of non-negative float32 numbers are ordered as integers: the threshold is found by bisection on them, one
    counting pass per bit, so nothing of the tensors' total size is ever sorted or held.

    Args:
        magnitudes: float32, not negative.
        share: of all entries, in (0, 1]. Ties at the threshold are all in.

    Returns:
        bool masks by the same names, shaped alike.
    """
    if share == 1:
        return {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in magnitudes.items()}
    count = math.ceil(share * sum(tensor.numel() for tensor in magnitudes.values()))
    bits = {name: tensor.contiguous().view(torch.int32) for name, tensor in magnitudes.items()}
    low, high = 0, 2**31 - 1  # at least `count` entries are >= low; fewer are >= high + 1
    while low < high:
        middle = (low + high + 1) // 2
        if sum(int((tensor >= middle).sum()) for tensor in bits.values()) >= count:
            low = middle
        else:
            high = middle - 1
    return {name: tensor >= low for name, tensor in bits.items()}
