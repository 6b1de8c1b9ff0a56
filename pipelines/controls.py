"""Controls: what generated media shall be like, as differentiable losses for `pipelines.ditto`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sublimate.pipelines.detector import Detector

Control = Callable[[Tensor], Tensor]
"""Media (batch, channels, height, width), images in [0, 1] -> a loss per sample (batch,), 0 where it is obeyed."""

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def keep(reference: Tensor, mask: Tensor) -> Control:
    """Known pixels stay: inpainting, outpainting, or continuing a spectrogram in time, by the mask's shape.

    Args:
        reference: (channels, height, width), what is known.
        mask: broadcastable to the reference, 1 where it shall be kept and 0 where it may change.

    Returns:
        The mean squared difference over the known pixels.

    Raises:
        ValueError: for a mask that keeps nothing.
    """
    known = torch.broadcast_to(mask.to(reference.dtype), reference.shape)
    if not bool(known.any()):
        raise ValueError("The mask keeps no pixel: set it to 1 where the reference shall stay.")

    def control(media: Tensor) -> Tensor:
        weights = torch.broadcast_to(known.to(media), media.shape)
        error = (weights * (media - reference.to(media))).square().flatten(1).sum(1)
        return error / weights.flatten(1).sum(1).clamp_min(1e-12)

    return control


def colour(target: tuple[float, ...], mask: Tensor | None = None) -> Control:
    """The mean colour of a region.

    Args:
        target: one value per channel, in the media's range.
        mask: (height, width), how much each pixel counts; all alike unless given.
    """

    def control(media: Tensor) -> Tensor:
        wanted = torch.tensor(target, dtype=media.dtype, device=media.device)
        weights = (
            torch.ones_like(media[:, :1]) if mask is None else torch.broadcast_to(mask.to(media), media[:, :1].shape)
        )
        mean = (weights * media).sum((2, 3)) / weights.sum((2, 3)).clamp_min(1e-12)
        return (mean - wanted).square().mean(1)

    return control


def structure(reference: Tensor, *, cells: int = 8) -> Control:
    """The layout of a reference, whatever its colours: self-similarity of its parts.

    Both are cut into cells x cells parts; what is compared is how alike each two parts of one picture are, as DITTO
    does with frames of music.

    Args:
        reference: (channels, height, width).
        cells: parts along each side.
    """
    wanted = _self_similarity(reference[None], cells)

    def control(media: Tensor) -> Tensor:
        return (_self_similarity(media, cells) - wanted.to(media)).square().flatten(1).mean(1)

    return control


def _self_similarity(media: Tensor, cells: int) -> Tensor:
    """Cosine similarities of the parts' luminances, (batch, cells^2, cells^2)."""
    grey = luminance(media)
    size = grey.shape[-2] // cells, grey.shape[-1] // cells
    if min(size) < 1:
        raise ValueError(f"Media of {grey.shape[-2]}x{grey.shape[-1]} have no {cells}x{cells} parts: ask for fewer.")
    parts = F.unfold(grey, size, stride=size).transpose(1, 2)
    # A constant keeps empty parts comparable: two of them are alike.
    parts = F.normalize(torch.cat([parts, torch.full_like(parts[..., :1], 0.1)], dim=-1), dim=-1)
    return parts @ parts.transpose(1, 2)


def luminance(media: Tensor) -> Tensor:
    """(batch, 1, height, width): BT.601 luminance of colour images, the mean of other media's channels."""
    if media.shape[1] != 3:
        return media.mean(1, keepdim=True)
    weights = torch.tensor(_LUMA, dtype=media.dtype, device=media.device)
    return (media * weights[:, None, None]).sum(1, keepdim=True)


def brightness_map(target: Tensor) -> Control:
    """A coarse map of luminance: where it shall be light and where dark.

    Args:
        target: (height, width) of the map, any size up to the media's; media are averaged to it.
    """

    def control(media: Tensor) -> Tensor:
        coarse = F.adaptive_avg_pool2d(luminance(media), (target.shape[-2], target.shape[-1]))
        return (coarse[:, 0] - target.to(media)).square().flatten(1).mean(1)

    return control


def shows(detector: Detector, **labels: str) -> Control:
    """What a detector shall see: -log of the probability of a label, summed over the groups asked for.

    Args:
        detector: differentiable in the images.
        labels: group -> label, such as `digit="seven", ink="red"`.

    Raises:
        ValueError: for a group or label that the detector does not know, or none at all.
    """
    wanted: dict[str, int] = {}
    for group, label in labels.items():
        if label not in detector.groups.get(group, ()):
            known = ", ".join(detector.groups.get(group, detector.groups))
            raise ValueError(f"The detector knows no {group} {label!r}; it knows {known}.")
        wanted[group] = detector.groups[group].index(label)
    if not wanted:
        raise ValueError("Say what shall be seen: shows(detector, digit='seven').")

    def control(media: Tensor) -> Tensor:
        seen = detector(media)
        losses = [-seen[group][:, index].clamp_min(1e-12).log() for group, index in wanted.items()]
        return torch.stack(losses).sum(0)

    return control


def intensity(curve: Tensor) -> Control:
    """How loud sound is over time (DITTO's dynamics): a spectrogram's mean over frequencies, smoothed to the curve.

    Args:
        curve: (frames,), one value per part of the time axis, in the spectrogram's units.
    """

    def control(media: Tensor) -> Tensor:
        loudness = F.adaptive_avg_pool2d(media.mean(1, keepdim=True), (len(curve), 1))[:, 0, :, 0]
        return (loudness - curve.to(media)).square().mean(1)

    return control


def together(controls: Mapping[Control, float]) -> Control:
    """Several controls at once.

    Args:
        controls: control -> its weight.
    """

    def control(media: Tensor) -> Tensor:
        return torch.stack([weight * one(media) for one, weight in controls.items()]).sum(0)

    return control
