"""Ink as a data set: pure in its index, balanced, and with broken pictures that are labelled as such."""

from collections import Counter

import pytest
import torch

from sublimate.training.ink.corruptions import IGNORED, KINDS, NO_DIGIT, NO_INK, NO_STYLE, broken
from sublimate.training.ink.renderer import INK_COLOURS
from sublimate.training.ink.vocabulary import all_glyphs
from sublimate.training.ink.world import glyph_at, sample


def test_a_picture_depends_on_its_index_alone():
    images, glyphs = sample(range(100, 130), seed=3)
    alone, glyph = sample([117], seed=3)
    assert torch.equal(alone[0], images[17]) and glyph[0] == glyphs[17] == glyph_at(117, "train", 3)
    again, reversed_glyphs = sample(range(129, 99, -1), seed=3)
    assert torch.equal(again.flip(0), images) and reversed_glyphs[::-1] == glyphs


@pytest.mark.slow
@pytest.mark.parametrize("other", [{"seed": 4}, {"split": "held_out"}])
def test_seed_and_split_change_the_pictures(other):
    images, _ = sample(range(8))
    assert not torch.equal(images, sample(range(8), **other)[0])


def test_every_round_holds_every_combination_once():
    for start in (0, 240):
        assert Counter(glyph_at(index, "train", 0) for index in range(start, start + 240)) == Counter(all_glyphs())
    assert [glyph_at(i, "train", 0) for i in range(240)] != [glyph_at(i, "train", 0) for i in range(240, 480)]


@pytest.mark.parametrize("indices", [[], [3, -1]])
def test_indices_that_cannot_be_are_refused(indices):
    with pytest.raises(ValueError, match="numbered from 0"):
        sample(indices)


def test_broken_pictures_are_pure_in_their_index():
    images, targets = broken(range(40), seed=1)
    assert images.shape == (40, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    for index in range(30, 40):
        alone = broken([index], seed=1)
        assert torch.equal(alone.images[0], images[index]) and torch.equal(alone.targets[0], targets[index])
    assert not torch.equal(images, broken(range(40), seed=2).images)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_what_is_missing(kind):
    digit, ink, style = broken(range(12), kinds=[kind]).targets.T.tolist()
    if kind == "foreign_ink":
        assert max(digit) < NO_DIGIT and set(ink) == {NO_INK} and max(style) < NO_STYLE
        return
    assert set(digit) == {NO_DIGIT}
    if kind in ("noise", "blank", "blobs"):
        assert set(ink) == {NO_INK} and set(style) == {NO_STYLE}
    else:
        assert NO_INK not in ink and NO_STYLE not in style
    if kind == "scribbles":
        assert IGNORED not in ink + style


def test_scrambling_keeps_the_pixels_and_moves_them():
    images, targets = broken(range(6), kinds=["scrambled"])
    brightest = images.flatten(2)[torch.arange(6), :, images.sum(1).flatten(1).argmax(1)]
    lit = [target for target, colour in zip(targets[:, 1].tolist(), brightest, strict=True) if colour.min() < 0.3]
    near = [int(torch.cdist(c[None], INK_COLOURS).argmin()) for c in brightest if c.min() < 0.3]
    assert lit == near


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="'fog'"):
        broken(range(2), kinds=["fog"])
    with pytest.raises(ValueError, match="come in the kinds"):
        broken(range(2), kinds=[])
