"""Controls: what generated media shall be like, as differentiable losses for `pipelines.ditto`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sublimate.pipelines.detector import Detector

Control = Callable[[Tensor], Tensor]
"""Media (batch, channels, height, width), images in [0, 1] or spectrograms (batch, 1, frames, bins) -> a loss per
sample (batch,), 0 where it is obeyed."""

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


def melody(notes: Sequence[int | None], bins: Tensor) -> Control:
    """Which note sounds when (DITTO's melody): -log of the share of energy in the wanted pitch class, over time.

    The energy of a log-mel spectrogram x is exp(2 x). Mel bins are too wide for the semitones of low notes, so this
    leads towards a melody's overtones more than its bass.

    Args:
        notes: the pitch class of each part of the time axis, 0 for C to 11 for B; None for no wish.
        bins: (12, bins), which bins sound like which class, see `pitch_classes`.

    Raises:
        ValueError: without a note, or for one that no bin sounds like.
    """
    wanted = [(i, note) for i, note in enumerate(notes) if note is not None]
    if not wanted:
        raise ValueError("The melody has no note: give at least one pitch class, 0 for C to 11 for B.")
    for _, note in wanted:
        if not 0 <= note < 12 or not bool(bins[note].any()):
            raise ValueError(f"No mel bin sounds like pitch class {note}: use 0 to 11, and bins fine enough for it.")
    parts, classes = (list(column) for column in zip(*wanted, strict=True))

    def control(media: Tensor) -> Tensor:
        # Relative to the loudest bin, which shares do not notice.
        energy = (2 * (media - media.amax((1, 2, 3), keepdim=True))).exp()
        coarse = F.adaptive_avg_pool2d(energy, (len(notes), media.shape[-1]))[:, 0]
        chroma = coarse @ bins.to(media).T
        share = chroma / chroma.sum(-1, keepdim=True).clamp_min(1e-30)
        return -share[:, parts, classes].clamp_min(1e-12).log().mean(1)

    return control


def pitch_classes(bins: int, *, lowest: float = 0.0, highest: float = 8000.0) -> Tensor:
    """Which mel bins sound like which of the twelve pitch classes, by the frequency at their centre.

    The scale is Slaney's, which AudioLDM's spectrograms have: linear below 1000 Hz, logarithmic above.

    Args:
        bins: mel bins of a spectrogram.
        lowest, highest: the ends of the scale in Hz.

    Returns:
        (12, bins), 1 where a bin belongs to a class, C first; bins below 27.5 Hz belong to none.

    Raises:
        ValueError: for ends that make no scale.
    """
    if not 0 <= lowest < highest or bins < 1:
        raise ValueError(f"{bins} mel bins from {lowest} to {highest} Hz make no scale.")
    low, high = (_mel(hertz) for hertz in (lowest, highest))
    centres = [_hertz(low + (high - low) * (i + 1) / (bins + 1)) for i in range(bins)]
    table = torch.zeros(12, bins)
    for i, hertz in enumerate(centres):
        if hertz >= 27.5:
            # A4, 440 Hz, is the MIDI note 69, and C is a multiple of 12.
            table[round(69 + 12 * math.log2(hertz / 440)) % 12, i] = 1
    return table


# Slaney's mel scale: 15 mels at 1000 Hz, then 27 for each factor of 6.4.
_LINEAR, _KNEE, _RATIO = 3 / 200, 1000.0, 27 / math.log(6.4)


def _mel(hertz: float) -> float:
    return _LINEAR * hertz if hertz < _KNEE else _LINEAR * _KNEE + _RATIO * math.log(hertz / _KNEE)


def _hertz(mel: float) -> float:
    return mel / _LINEAR if mel < _LINEAR * _KNEE else _KNEE * math.exp((mel - _LINEAR * _KNEE) / _RATIO)


def together(controls: Mapping[Control, float]) -> Control:
    """Several controls at once.

    Args:
        controls: control -> its weight.
    """

    def control(media: Tensor) -> Tensor:
        return torch.stack([weight * one(media) for one, weight in controls.items()]).sum(0)

    return control
