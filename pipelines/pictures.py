"""Images as PNG bytes, one at a time or laid out in a grid."""

from __future__ import annotations

from io import BytesIO
from math import ceil

import torch
from PIL import Image
from torch import Tensor


def to_png(image: Tensor, *, scale: int = 1, largest: int | None = None) -> bytes:
    """One image as a PNG file.

    Args:
        image: (3, H, W), float in [0, 1]; values outside are clipped.
        scale: whole-number enlargement that keeps pixels square and sharp, for images of a few dozen pixels.
        largest: the longer edge is shrunk to this many pixels where it has more.

    Returns:
        The file's bytes.

    Raises:
        ValueError: for another shape, or values that are not finite.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"a picture has shape (3, H, W), got {tuple(image.shape)}")
    if not image.isfinite().all():
        raise ValueError("the picture contains values that are not finite; check the model that made it")
    pixels = (image.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).contiguous()
    picture = Image.fromarray(pixels.numpy())
    if scale != 1:
        picture = picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)
    if largest is not None:
        picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    file = BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


def pictures_of(media: Tensor, medium: str) -> Tensor:
    """Media as images: images as they are, spectrograms in grey, with time to the right and low notes at the bottom.

    Args:
        media: images (N, 3, H, W) in [0, 1], or spectrograms (N, 1, frames, bins).
        medium: the family's, "image" or "audio".

    Returns:
        (N, 3, H, W) in [0, 1]; each spectrogram spans its own range.
    """
    if medium == "image":
        return media
    turned = media.transpose(2, 3).flip(2)
    low, high = turned.amin((1, 2, 3), keepdim=True), turned.amax((1, 2, 3), keepdim=True)
    return ((turned - low) / (high - low).clamp_min(1e-12)).expand(-1, 3, -1, -1)


def image_grid(images: Tensor, *, columns: int | None = None, gap: int = 2, background: float = 1.0) -> Tensor:
    """Many images in one, row by row.

    Args:
        images: (N, 3, H, W), N >= 1.
        columns: images per row; about as many as rows unless given.
        gap: pixels between images.
        background: what fills gaps and an unfinished last row.

    Returns:
        (3, H', W').

    Raises:
        ValueError: without images, or for another shape.
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"a grid needs images (N, 3, H, W) with N >= 1, got shape {tuple(images.shape)}")
    n, channels, height, width = images.shape
    columns = columns or ceil(n**0.5)
    rows = ceil(n / columns)
    grid = images.new_full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), background)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return grid
