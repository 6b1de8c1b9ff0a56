"""A Hugging Face image processor as differentiable tensor operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # PIL's resampling numbers
_WARPED_FROM = 384  # ConvNeXt's rule: crop below this size, warp from it on


@dataclass(frozen=True)
class Preprocessing:
    """What turns images in [0, 1] into a network's pixel values, with gradients.

    Attributes:
        size: (height, width) to warp to; an int is the shorter edge, keeping the aspect; None leaves the size.
        mode: interpolation, one of torch's names.
        crop: (height, width) cut from the centre afterwards, or None.
        scale: factor on the pixels; 1 for networks that see [0, 1] before normalisation.
        mean: per channel, subtracted.
        std: per channel, divided by.
    """

    size: tuple[int, int] | int | None
    mode: str = "bilinear"
    crop: tuple[int, int] | None = None
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __call__(self, images: Tensor) -> Tensor:
        """Maps images (B, 3, H, W) in [0, 1] to pixel values (B, 3, h, w)."""
        if self.size is not None:
            size = self.size if isinstance(self.size, tuple) else _by_shorter_edge(images, self.size)
            # Antialiased as PIL does it; cubic kernels overshoot, and PIL's bytes cannot.
            smooth = self.mode in ("bilinear", "bicubic")
            images = interpolate(images, size, mode=self.mode, antialias=smooth).clamp(0, 1)
        if self.crop is not None:
            height, width = self.crop
            top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
            images = images[..., top : top + height, left : left + width]
        mean, std = (images.new_tensor(value)[:, None, None] for value in (self.mean, self.std))
        return (images * self.scale - mean) / std

    @classmethod
    def of(cls, processor: Any) -> Preprocessing:
        """Reads a `transformers` image processor and proves the translation on a random image.

        Args:
            processor: what `AutoImageProcessor.from_pretrained` returns.

        Returns:
            The same preprocessing on tensors; equal up to the processor's rounding to bytes.

        Raises:
            ValueError: if the processor does something this translation does not.
        """
        made = _translated(processor)
        generator = torch.Generator().manual_seed(0)
        # Mid-range: a cubic kernel's overshoot at black and white is clipped by bytes after each axis, by us once.
        probe = torch.randint(64, 192, (3, 60, 80), generator=generator, dtype=torch.uint8)
        theirs = torch.as_tensor(processor(probe.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"])[0]
        ours = made(probe[None] / 255)[0]
        # A byte is 1/255 before normalisation; resampling in bytes rounds once per axis.
        allowed = 2 / 255 * made.scale / min(made.std)
        if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, rtol=0, atol=allowed):
            raise ValueError(
                f"the image processor {type(processor).__name__} does more than resize, crop and normalise; "
                "wrap the network in a Detector with its own preprocessing"
            )
        return made


def _translated(processor: Any) -> Preprocessing:
    size: tuple[int, int] | int | None = None
    crop: tuple[int, int] | None = None
    if getattr(processor, "do_resize", False):
        edge = getattr(processor.size, "shortest_edge", None)
        size = edge or (processor.size.height, processor.size.width)
        if edge and getattr(processor, "crop_pct", None):
            if edge < _WARPED_FROM:
                size, crop = int(edge / processor.crop_pct), (edge, edge)
            else:
                size = (edge, edge)
        if isinstance(size, tuple) and None in size:
            raise ValueError(f"the image processor resizes by {processor.size}, not by height and width or one edge")
    if getattr(processor, "do_center_crop", False):
        crop = (processor.crop_size.height, processor.crop_size.width)
    normalised = getattr(processor, "do_normalize", False)
    return Preprocessing(
        size=size,
        mode=_MODES.get(int(getattr(processor, "resample", 2)), "bilinear"),
        crop=crop,
        scale=255 * processor.rescale_factor if getattr(processor, "do_rescale", False) else 255.0,
        mean=tuple(processor.image_mean) if normalised else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if normalised else (1.0, 1.0, 1.0),
    )


def _by_shorter_edge(images: Tensor, edge: int) -> tuple[int, int]:
    height, width = images.shape[-2:]
    if height <= width:
        return edge, int(edge * width / height)
    return int(edge * height / width), edge
