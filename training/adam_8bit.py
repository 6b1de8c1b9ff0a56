"""AdamW whose moments have 8 bits each (Dettmers et al. 2022, arXiv 2110.02861), where bitsandbytes is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Of bitsandbytes: smaller tensors keep moments of 32 bits; each block of a larger one has a scale of its own.
SMALLEST = 4096
BLOCK = 256


def adam_8bit(parameters: Sequence[Tensor]) -> Callable[..., torch.optim.Optimizer]:
    """What makes an 8-bit AdamW of parameters and AdamW's options.

    Args:
        parameters: that it will move; those without storage only have its memory counted.

    Raises:
        ValueError: when bitsandbytes is not installed.
    """
    if any(isinstance(parameter, FakeTensor) for parameter in parameters):
        return CountedAdam8bit
    try:
        return importlib.import_module("bitsandbytes").optim.AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"use_8bit_adam needs bitsandbytes ({error}): pip install 'sublimate[8bit]', or leave it out."
        ) from error


class CountedAdam8bit(torch.optim.Optimizer):
    """Holds for parameters without storage what bitsandbytes holds for others, and moves nothing."""

    def __init__(self, parameters: Sequence[Tensor], *, lr: float, **options: Any) -> None:
        super().__init__(parameters, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Makes the moments, the first time."""
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            if state:
                continue
            for moment in ("state1", "state2"):
                small = parameter.numel() < SMALLEST
                state[moment] = torch.zeros_like(parameter, dtype=torch.float32 if small else torch.uint8)
                if not small:
                    state[f"{moment}_scales"] = parameter.new_zeros(-(-parameter.numel() // BLOCK))
