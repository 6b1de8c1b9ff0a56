"""Transformers on square patches of latents: the sizes they draw."""

from __future__ import annotations

from typing import Any


def patched_shape(pipe: Any, height: int | None, width: int | None) -> tuple[int, int, int]:
    """(channels, height, width) of one x_t.

    Args:
        pipe: a pipeline whose `transformer` cuts latents into patches.
        height, width: of the image in pixels; the checkpoint's own size unless given.

    Raises:
        ValueError: for a size that is no whole number of patches.
    """
    config, factor = pipe.transformer.config, pipe.vae_scale_factor
    unit = factor * config.patch_size
    for pixels in (height, width):
        if pixels is not None and (pixels <= 0 or pixels % unit):
            raise ValueError(f"Images must measure a multiple of {unit} pixels, not {pixels}.")
    return (
        config.in_channels,
        config.sample_size if height is None else height // factor,
        config.sample_size if width is None else width // factor,
    )
