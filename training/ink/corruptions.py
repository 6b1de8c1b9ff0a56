"""Pictures that are not what Ink draws: what the detector learns to reject, kind by kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sublimate.training.ink.renderer import BACKGROUND, INK_COLOURS, SIZE, blurred, paint, scans, strokes
from sublimate.training.ink.vocabulary import DIGITS, INKS, STYLES
from sublimate.training.ink.world import describe, glyph_at, sample, stream
from sublimate.training.randomness import key

IGNORED = -100
"""A target that says nothing: the picture still shows something of that group, but not clearly."""

NO_DIGIT, NO_INK, NO_STYLE = len(DIGITS), len(INKS), len(STYLES)
"""Targets of the reject class in each group."""


class Broken(NamedTuple):
    """Broken pictures (B, 3, 32, 32) in [0, 1] and what a detector should say of them.

    Targets (B, 3) have the columns digit, ink, style and hold a label, `NO_DIGIT`, `NO_INK`, `NO_STYLE`, or `IGNORED`.
    """

    images: Tensor
    targets: Tensor


def broken(indices: Sequence[int], seed: int = 0, kinds: Sequence[str] | None = None) -> Broken:
    """Broken pictures; number `i` is a pure function of the seed, `i` and the kinds.

    Args:
        indices: which pictures; kinds take turns, picture `i` is of kind `i % len(kinds)`.
        seed: another seed gives other pictures.
        kinds: of `KINDS`; all of them when None.

    Raises:
        ValueError: for a kind that does not exist or when there are none.
    """
    kinds = tuple(KINDS) if kinds is None else tuple(kinds)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"Broken pictures come in the kinds {', '.join(KINDS)}, not {unknown}.")
    images = torch.empty(len(indices), 3, SIZE, SIZE)
    targets = torch.empty(len(indices), 3, dtype=torch.long)
    for place, kind in enumerate(kinds):
        rows = [row for row, index in enumerate(indices) if index % len(kinds) == place]
        if rows:
            images[rows], targets[rows] = KINDS[kind]([int(indices[row]) for row in rows], seed)
    return Broken(images.clamp(0, 1), targets)


def noise(indices: Sequence[int], seed: int) -> Broken:
    """Gaussian noise of some strength and coarseness on a page of some grey."""
    images = []
    for index in indices:
        grey, strength, coarse, coloured = stream(4, seed, "noise", index).tolist()
        cells = SIZE // (1, 1, 2, 4)[int(4 * coarse)]
        field = _normal((3 if coloured < 0.7 else 1, cells, cells), seed, "noise", "field", index)
        field = F.interpolate(field[None], size=(SIZE, SIZE), mode="nearest")[0]
        images.append((grey + (0.08 + 0.4 * strength) * field).expand(3, -1, -1))
    return _all_rejected(torch.stack(images))


def blank(indices: Sequence[int], seed: int) -> Broken:
    """An empty page: Ink's own, or one colour, with a trace of noise and a slow gradient."""
    images = []
    for index in indices:
        u = stream(9, seed, "blank", index).float()
        page = torch.tensor(BACKGROUND) * 2 * u[1] if u[0] < 0.5 else u[1:4]
        across = torch.linspace(-1, 1, SIZE)
        slope = 0.1 * ((2 * u[4] - 1) * across[:, None] + (2 * u[5] - 1) * across[None, :])
        trace = 0.03 * u[6] * _normal((3, SIZE, SIZE), seed, "blank", "trace", index)
        images.append(page[:, None, None] + slope * u[7].round() + trace)
    return _all_rejected(torch.stack(images))


def blobs(indices: Sequence[int], seed: int) -> Broken:
    """A few soft discs on the page, in colours that are none of the inks."""
    rows = torch.arange(SIZE, dtype=torch.float32)
    images = []
    for index in indices:
        u = stream(1 + 4 * 4, seed, "blobs", index).float()
        picture = torch.tensor(BACKGROUND)[:, None, None].expand(3, SIZE, SIZE)
        colour = _foreign_colour(seed, "blobs", "colour", index)
        for x, y, radius, soft in u[1:].view(4, 4)[: 1 + int(4 * u[0])].tolist():
            away = ((rows[:, None] - SIZE * y) ** 2 + (rows[None, :] - SIZE * x) ** 2).sqrt()
            cover = torch.sigmoid((3 + 8 * radius - away) / (0.3 + 3 * soft))
            picture = picture + cover * (colour[:, None, None] - picture)
        images.append(picture)
    return _all_rejected(torch.stack(images))


def scrambled(indices: Sequence[int], seed: int) -> Broken:
    """Real pictures cut into tiles of 4 or 8 pixels and put together at random: no digit, but the ink is there."""
    images, labels = _real(indices, seed, "scrambled")
    pieces = []
    for row, index in enumerate(indices):
        size = 4 if stream(1, seed, "scrambled", "size", index).item() < 0.5 else 8
        tiles = F.unfold(images[row : row + 1], size, stride=size)
        order = torch.randperm(tiles.shape[2], generator=_generator(seed, "scrambled", "order", index))
        pieces.append(F.fold(tiles[:, :, order], (SIZE, SIZE), size, stride=size)[0])
    return Broken(torch.stack(pieces), _targets(ink=labels[:, 1], like=labels))


def smeared(indices: Sequence[int], seed: int) -> Broken:
    """Real pictures blurred until the digit is gone."""
    images, labels = _real(indices, seed, "smeared")
    smooth = []
    for row, index in enumerate(indices):
        width = 4.5 + 3 * stream(1, seed, "smeared", "width", index).item()
        smooth.append(blurred(images[row].unsqueeze(1), width).squeeze(1))
    return Broken(torch.stack(smooth), _targets(like=labels))


def halves(indices: Sequence[int], seed: int) -> Broken:
    """Half of one picture beside half of another: other digit, other ink."""
    first, second, labels = _two_real(indices, seed, "halves")
    near = torch.zeros(len(first), 1, SIZE, SIZE)
    for row, index in enumerate(indices):
        if stream(1, seed, "halves", "side", index).item() < 0.5:
            near[row, :, : SIZE // 2] = 1
        else:
            near[row, :, :, : SIZE // 2] = 1
    return Broken(near * first + (1 - near) * second, _targets(like=labels))


def overlaid(indices: Sequence[int], seed: int) -> Broken:
    """Two pictures exposed on one page: other digit, other ink."""
    first, second, labels = _two_real(indices, seed, "overlaid")
    return Broken(torch.maximum(first, second), _targets(like=labels))


def warped(indices: Sequence[int], seed: int) -> Broken:
    """Real pictures under an elastic deformation too strong to read."""
    images, labels = _real(indices, seed, "warped")
    axis = (2 * torch.arange(SIZE) + 1) / SIZE - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    push = torch.stack([_normal((2, 5, 5), seed, "warped", "push", index) for index in indices])
    push = F.interpolate(push, size=(SIZE, SIZE), mode="bicubic", align_corners=True)
    warp = F.grid_sample(images, grid + 0.55 * push.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    return Broken(warp, _targets(ink=labels[:, 1], like=labels))


def scribbles(indices: Sequence[int], seed: int) -> Broken:
    """Random pen strokes in a real ink and style: everything but a digit."""
    glyphs, _, pose = describe(indices, "train", key(seed, "scribbles"))
    labels = torch.tensor(glyphs)
    masks = []
    for index in indices:
        u = stream(2 + 3 * 8, seed, "scribbles", index).float()
        curves = u[2:].view(3, 4, 2)[: 2 + int(2 * u[0])] * 1.5 - 0.75  # one curve alone may read as a digit
        masks.append(_pen(curves, 0.10 + 0.09 * u[1].item()))
    images = paint(torch.stack(masks), INK_COLOURS[labels[:, 1]], labels[:, 2], pose)
    return Broken(images, _targets(ink=labels[:, 1], style=labels[:, 2], like=labels))


def foreign_ink(indices: Sequence[int], seed: int) -> Broken:
    """Proper digits in a proper style, in a colour that is none of the inks."""
    glyphs, chosen, pose = describe(indices, "train", key(seed, "foreign"))
    labels = torch.tensor(glyphs)
    colours = torch.stack([_foreign_colour(seed, "foreign", "colour", index) for index in indices])
    pictures, _ = scans("train")
    images = paint(strokes(pictures[chosen], pose), colours, labels[:, 2], pose)
    return Broken(images, torch.stack([labels[:, 0], torch.full_like(labels[:, 0], NO_INK), labels[:, 2]], dim=1))


KINDS: Mapping[str, Callable[[Sequence[int], int], Broken]] = {
    "noise": noise,
    "blank": blank,
    "blobs": blobs,
    "scrambled": scrambled,
    "smeared": smeared,
    "halves": halves,
    "overlaid": overlaid,
    "warped": warped,
    "scribbles": scribbles,
    "foreign_ink": foreign_ink,
}
"""Every kind of broken picture by name. All but "foreign_ink" show no digit."""


def _real(indices: Sequence[int], seed: int, kind: str) -> tuple[Tensor, Tensor]:
    images, glyphs = sample(indices, "train", key(seed, kind))
    return images, torch.tensor(glyphs)


def _two_real(indices: Sequence[int], seed: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Two pictures that differ in digit and in ink, and the labels of the first."""
    own = key(seed, kind)
    partners = []
    for index in indices:
        glyph = glyph_at(index, "train", own)
        partner = index + 1
        while (other := glyph_at(partner, "train", own)).digit == glyph.digit or other.ink == glyph.ink:
            partner += 1
        partners.append(partner)
    first, labels = _real(indices, seed, kind)
    second, _ = _real(partners, seed, kind)
    return first, second, labels


def _pen(curves: Tensor, width: float) -> Tensor:
    """A mask (1, 64, 64) of cubic Bezier curves (N, 4, 2), in page coordinates from -1 to 1, drawn `width` wide."""
    t = torch.linspace(0, 1, 24)[:, None]
    basis = torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)
    points = (basis @ curves).reshape(-1, 2)
    axis = torch.linspace(-1, 1, 2 * SIZE)
    page = torch.cartesian_prod(axis, axis)
    away = torch.cdist(page, points).min(dim=1).values.view(1, 2 * SIZE, 2 * SIZE)
    return torch.sigmoid((width - away) * 60)


def _foreign_colour(*parts: object) -> Tensor:
    """A bright colour (3,) far from every ink: of eight random ones the one whose nearest ink is farthest."""
    u = stream(8 * 4, *parts).float().view(8, 4)
    colours = u[:, :3] / u[:, :3].amax(dim=1, keepdim=True) * (0.6 + 0.4 * u[:, 3:])
    return colours[torch.cdist(colours, INK_COLOURS).min(dim=1).values.argmax()]


def _all_rejected(images: Tensor) -> Broken:
    return Broken(images, torch.tensor([[NO_DIGIT, NO_INK, NO_STYLE]]).repeat(len(images), 1))


def _targets(*, like: Tensor, ink: Tensor | None = None, style: Tensor | None = None) -> Tensor:
    """Targets of pictures without a digit; an ink or style that is not given stays unsaid."""
    unsaid = torch.full_like(like[:, 0], IGNORED)
    return torch.stack(
        [torch.full_like(unsaid, NO_DIGIT), unsaid if ink is None else ink, unsaid if style is None else style], dim=1
    )


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(key(*parts))


def _normal(shape: Sequence[int], *parts: object) -> Tensor:
    return torch.randn(tuple(shape), generator=_generator(*parts))
