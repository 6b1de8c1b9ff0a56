"""Which precisions a machine computes in itself, and whose word on them counts."""

from __future__ import annotations

import warnings

import torch


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
