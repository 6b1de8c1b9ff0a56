"""Turns scanned handwriting into coloured 32x32 pictures: pose, ink and one of four styles."""

from __future__ import annotations

import math
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sublimate.training.ink.vocabulary import DIGITS, STYLES

Split = Literal["train", "held_out"]

SIZE = 32
CLEAR_VOTES = 4
"""Of five nearest scans this many must share a scan's label."""
_CANVAS = 2 * SIZE  # strokes are drawn at twice the size and averaged down: that is the anti-aliasing
_HELD_OUT_PER_DIGIT = 30
_SPLIT_SEED = 8128
_SPLIT_VOTES = 3
BACKGROUND = (0.035, 0.035, 0.05)
INK_COLOURS = torch.tensor(
    [
        [0.95, 0.13, 0.10],  # red
        [0.10, 0.80, 0.22],  # green
        [0.12, 0.36, 1.00],  # blue
        [1.00, 0.86, 0.08],  # yellow
        [0.96, 0.96, 0.96],  # white
        [0.68, 0.16, 0.90],  # purple
    ]
)
"""RGB of each of `INKS`, in [0, 1]."""


class Pose(NamedTuple):
    """How each digit of a batch lies on the page; every field has shape (B,).

    Attributes:
        angle: rotation in radians, counter-clockwise on screen.
        scale: size relative to the usual 25 pixels.
        shift_x: pixels to the right.
        shift_y: pixels downwards.
        weight: stroke weight; the contour level is lowered by it, so positive is bolder.
        phase: offset of the stripes in periods, in [0, 1).
        tint: brightness of the ink relative to its usual colour.
    """

    angle: Tensor
    scale: Tensor
    shift_x: Tensor
    shift_y: Tensor
    weight: Tensor
    phase: Tensor
    tint: Tensor

    @staticmethod
    def from_uniform(u: Tensor) -> Pose:
        """The poses Ink draws, from `u` (B, 7) uniform in [0, 1).

        Rotation within 12 degrees, scale 0.85 to 1.1, shifts within 2 pixels.
        """
        u = u.float()
        signed = 2 * u - 1
        return Pose(
            angle=signed[:, 0] * (12 * torch.pi / 180),
            scale=0.85 + 0.25 * u[:, 1],
            shift_x=2 * signed[:, 2],
            shift_y=2 * signed[:, 3],
            weight=0.05 * signed[:, 4],
            phase=u[:, 5],
            tint=0.9 + 0.1 * u[:, 6],
        )


@cache
def scans(split: Split) -> tuple[Tensor, Tensor]:
    """The scanned digits of one split: pictures (N, 8, 8) in [0, 1] and their labels (N,).

    UCI's optical recognition set, as bundled with scikit-learn: 1,797 scans, less the 43 that can be mistaken for
    another digit (`neighbour_votes` below `CLEAR_VOTES`). That leaves 1,458 to train on and 296 held out, the same
    ones always.

    Raises:
        ValueError: when the split is not "train" or "held_out".
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"Ink has the splits 'train' and 'held_out', not {split!r}.")
    from sklearn.datasets import load_digits  # imported here: most users of the renderer never load the scans

    data = load_digits()
    pictures = torch.from_numpy(data.images).float() / 16
    labels = torch.from_numpy(data.target).long()
    votes = neighbour_votes(pictures, labels)
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    chosen = []
    for digit in range(len(DIGITS)):
        # First the split, then the strict rule: a stricter or a laxer one moves no scan to the other side.
        members = torch.nonzero((labels == digit) & (votes >= _SPLIT_VOTES)).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        chosen.append(members[:_HELD_OUT_PER_DIGIT] if split == "held_out" else members[_HELD_OUT_PER_DIGIT:])
    indices = torch.cat(chosen).sort().values
    indices = indices[votes[indices] >= CLEAR_VOTES]
    return pictures[indices], labels[indices]


def neighbour_votes(pictures: Tensor, labels: Tensor, neighbours: int = 5) -> Tensor:
    """How many of each scan's nearest other scans share its label.

    At eight by eight pixels some scans look like another digit; a picture made of one would not show what its caption
    says.

    Args:
        pictures: (N, 8, 8) in [0, 1], in sixteenths.
        labels: (N,).
        neighbours: how many others are asked.

    Returns:
        Counts from 0 to `neighbours`, (N,).
    """
    levels = (pictures * 16).round().flatten(1)  # whole numbers: the distances are exact, the same on every machine
    squares = levels.square().sum(dim=1)
    distances = squares[:, None] + squares[None, :] - 2 * levels @ levels.T
    distances.fill_diagonal_(torch.inf)
    nearest = distances.sort(dim=1, stable=True).indices[:, :neighbours]
    return (labels[nearest] == labels[:, None]).sum(dim=1)


def strokes(pictures: Tensor, pose: Pose) -> Tensor:
    """Crisp stroke masks (B, 1, 64, 64) in [0, 1] of scans (B, 8, 8) laid down with `pose`.

    The scan is read as a smooth height field (bicubic) and cut at one level, so the eight-pixel scan becomes a clean
    outline instead of a blurred block.
    """
    angle, scale, shift_x, shift_y = (part[:, None, None] for part in pose[:4])
    cos, sin = torch.cos(angle), torch.sin(angle)
    extent = 25.0 / SIZE * scale  # the part of the page that the scan covers
    move_x, move_y = 2 * shift_x / SIZE, 2 * shift_y / SIZE
    axis = (2 * torch.arange(_CANVAS) + 1) / _CANVAS - 1  # pixel centres, the page from -1 to 1
    # From page to scan: undo the shift, then the rotation, then the scale. Written out, because a batched matrix
    # product rounds differently from batch to batch, and a picture must not depend on its neighbours.
    x, y = axis[None, None, :] - move_x, axis[None, :, None] - move_y
    across, down = (cos * x - sin * y) / extent, (sin * x + cos * y) / extent
    grid = torch.stack([across, down], dim=-1) * (8 / 12)
    padded = F.pad(pictures[:, None], (2, 2, 2, 2))  # bicubic taps at the scan's edge must see paper, not its last row
    height = F.grid_sample(padded, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    level = 0.47 - pose.weight[:, None, None, None]
    return torch.sigmoid((height - level) * 18)


def paint(mask: Tensor, colour: Tensor, style: Tensor, pose: Pose) -> Tensor:
    """Pictures (B, 3, 32, 32) in [0, 1]: stroke masks (B, 1, 64, 64) filled with a colour in a style.

    Args:
        mask: strokes in [0, 1], 1 inside.
        colour: RGB in [0, 1], (B, 3); an ink's is `INK_COLOURS[ink]`.
        style: indices into `STYLES`, (B,).
        pose: gives the stripes' phase and the ink's tint.
    """
    colour = colour * pose.tint[:, None]
    page = torch.tensor(BACKGROUND)[None, :, None, None]
    painted = torch.empty(len(mask), 3, SIZE, SIZE)
    for index, name in enumerate(STYLES):
        members = torch.nonzero(style == index).flatten()
        if len(members) == 0:
            continue
        strokes_here, colour_here = mask[members], colour[members][:, :, None, None]
        if name == "neon":
            painted[members] = _neon(strokes_here, colour_here, page)
        else:
            cover = _cover(name, strokes_here, pose.phase[members])
            painted[members] = page + F.avg_pool2d(cover, 2) * (colour_here - page)
    return painted.clamp(0, 1)


def render(pictures: Tensor, ink: Tensor, style: Tensor, pose: Pose) -> Tensor:
    """Pictures (B, 3, 32, 32) in [0, 1] of scans (B, 8, 8) in [0, 1].

    Args:
        pictures: the scans.
        ink: indices into `INKS`, (B,).
        style: indices into `STYLES`, (B,).
        pose: how each digit lies on the page.

    Raises:
        ValueError: when the scans are not 8x8 or the batch sizes differ.
    """
    if pictures.ndim != 3 or pictures.shape[1:] != (8, 8):
        raise ValueError(f"Scans have shape (B, 8, 8), not {tuple(pictures.shape)}.")
    if not len(pictures) == len(ink) == len(style) == len(pose.angle):
        raise ValueError(f"Got {len(pictures)} scans, {len(ink)} inks, {len(style)} styles, {len(pose.angle)} poses.")
    return paint(strokes(pictures, pose), INK_COLOURS[ink], style, pose)


def blurred(image: Tensor, width: float) -> Tensor:
    """Gaussian blur of (B, 1, H, W) with a standard deviation of `width` pixels; what lies outside counts as black."""
    reach = math.ceil(3 * width)
    taps = [math.exp(-(x**2) / (2 * width**2)) for x in range(-reach, reach + 1)]
    taps = [tap / sum(taps) for tap in taps]
    for dim in (-1, -2):
        size = image.shape[dim]
        padded = F.pad(image, (reach, reach, 0, 0) if dim == -1 else (0, 0, reach, reach))
        # A convolution rounds differently from batch to batch; sums of shifted copies do not.
        image = sum((tap * padded.narrow(dim, place, size) for place, tap in enumerate(taps)), torch.zeros(()))
    return image


def _cover(style: str, mask: Tensor, phase: Tensor) -> Tensor:
    """How much ink lies where, (B, 1, 64, 64), for the styles that use one flat colour."""
    if style == "outline":
        return (F.max_pool2d(mask, 3, stride=1, padding=1) - _eroded(_eroded(mask))).clamp(0, 1)
    if style == "striped":
        along = torch.arange(_CANVAS, dtype=torch.float32)
        diagonal = (along[:, None] + along[None, :]) / 11.0  # eleven canvas pixels of x + y: a stripe every 3.9 pixels
        wave = torch.sin(2 * torch.pi * (diagonal + phase[:, None, None]))[:, None]
        return mask * torch.sigmoid((wave + 0.4) * 6)
    return mask


def _neon(mask: Tensor, colour: Tensor, page: Tensor) -> Tensor:
    """A pale core, a rim in the ink's colour, and its glow on the page."""
    core = F.avg_pool2d(_eroded(_eroded(mask)), 2)
    tube = F.avg_pool2d(mask, 2)
    glow = blurred(tube, 2.6)
    lit = page + (0.95 * glow).clamp(max=1) * (colour - page)
    lit = lit + tube * (colour - lit)
    return lit + core * (0.25 * colour + 0.75 - lit)


def _eroded(mask: Tensor) -> Tensor:
    """The mask with one canvas pixel taken off its border."""
    return -F.max_pool2d(-mask, 3, stride=1, padding=1)
