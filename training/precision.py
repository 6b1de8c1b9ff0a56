"""Which precisions a machine computes in itself, and whose word on them counts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sublimate.pipelines.placement import name_of

if TYPE_CHECKING:
    from sublimate.pipelines.model import Model


def check_precision(model: Model, mixed_precision: str) -> None:
    """Refuses a model whose weights and what trains beside them, in float32, would not compute together.

    Args:
        model: the frozen base. In bfloat16 it takes half the memory.
        mixed_precision: of the run, "no" or "bf16": autocast then brings both to bfloat16.

    Raises:
        ValueError: for a model in float16, or in bfloat16 without autocast.
    """
    if model.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"{model.source} is open in {name_of(model.dtype)}, in which nothing trains: open it in bfloat16 or "
            "float32."
        )
    if model.dtype == torch.bfloat16 and mixed_precision != "bf16":
        raise ValueError(
            f"{model.source} is open in bfloat16, and what trains is float32: set mixed_precision to bf16, or open it "
            "in float32."
        )


def autocast(device: torch.device, mixed_precision: str) -> torch.autocast:
    """What a run's networks run under.

    Rounded weights are not kept for later passes: in earlier releases of torch those of a pass without gradients would
    serve one with gradients, and those of sharded players would outlive their sharding.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision == "bf16", cache_enabled=False)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within this context, products of float32 matrices may be rounded to TF32 on GPUs that have it."""
    if not allowed:
        yield
        return
    products = torch.backends.cuda.matmul
    # Releases of torch that have the first know the second no longer once a program has used the first.
    name, value = ("fp32_precision", "tf32") if hasattr(products, "fp32_precision") else ("allow_tf32", True)
    before = getattr(products, name)
    setattr(products, name, value)
    try:
        yield
    finally:
        setattr(products, name, before)


def float32_products() -> str:
    """How products of float32 matrices are computed on GPUs: what results that are stored depend on."""
    products = torch.backends.cuda.matmul
    return str(products.fp32_precision if hasattr(products, "fp32_precision") else products.allow_tf32)


def warn_of_slow_bf16(device: torch.device) -> None:
    """Says so where bf16 would be emulated: such a CPU was seen to take twelve times as long as in float32."""
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        warnings.warn(
            "This CPU has no bf16 of its own and is much slower in it: set mixed_precision to no.", stacklevel=3
        )


def warn_of_launchers_precision(launchers: str, runs: str) -> None:
    """Says so where a launcher asks for a mixed precision that the run's own configuration does not."""
    if launchers not in ("no", runs):
        warnings.warn(
            f"The launcher says mixed_precision={launchers}, and the run's own {runs} counts: set "
            "trainer.mixed_precision.",
            stacklevel=3,
        )
