"""Ink's pictures: in range, crisp, and different in the ways their labels say."""

import pytest
import torch

from sublimate.training.ink.renderer import INK_COLOURS, SIZE, Pose, neighbour_votes, render, scans, strokes
from sublimate.training.ink.vocabulary import INKS, STYLES

CENTRED = 0.5


def pose(n, value=CENTRED):
    return Pose.from_uniform(torch.full((n, 7), value))


@pytest.mark.slow
def test_splits_are_stratified_and_disjoint():
    pictures, labels = scans("train")
    held_pictures, held_labels = scans("held_out")
    assert (len(pictures), len(held_pictures)) == (1458, 296)
    assert torch.bincount(held_labels).min() >= 28 and torch.bincount(held_labels).max() == 30
    assert pictures.min() >= 0 and pictures.max() == 1
    both = torch.cat([pictures, held_pictures]).flatten(1)
    assert len(both.unique(dim=0)) == 1754
    assert len(labels) == 1458


def test_a_scan_among_those_of_another_digit_gets_no_votes():
    near = torch.zeros(6, 8, 8)
    near[:, 0, 0] = torch.arange(6) / 16
    far = 1 - near
    labels = torch.tensor([1] * 6 + [2] * 6)
    labels[3] = 2
    votes = neighbour_votes(torch.cat([near, far]), labels)
    assert votes.tolist() == [4, 4, 4, 0, 4, 4, 5, 5, 5, 5, 5, 5]


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test'"):
        scans("test")


def test_pictures_have_the_right_shape_range_and_repeat():
    generator = torch.Generator().manual_seed(0)
    pictures = scans("train")[0][:48]
    ink = torch.randint(len(INKS), (48,), generator=generator)
    style = torch.randint(len(STYLES), (48,), generator=generator)
    poses = Pose.from_uniform(torch.rand(48, 7, generator=generator))
    images = render(pictures, ink, style, poses)
    assert images.shape == (48, 3, SIZE, SIZE) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, render(pictures, ink, style, poses))


def test_the_ink_decides_the_colour_of_a_solid_stroke():
    picture = scans("train")[0][:1].expand(len(INKS), 8, 8)
    images = render(picture, torch.arange(len(INKS)), torch.zeros(len(INKS), dtype=torch.long), pose(len(INKS), 0.999))
    brightest = images.flatten(2).sum(1).argmax(1)
    strongest = images.flatten(2)[torch.arange(len(INKS)), :, brightest]
    assert torch.cdist(strongest, INK_COLOURS).argmin(1).tolist() == list(range(len(INKS)))


def test_styles_differ_in_how_ink_covers_the_page():
    n = len(STYLES)
    bar = torch.zeros(n, 8, 8)
    bar[:, 1:7, 3:5] = 1
    images = render(bar, torch.zeros(n, dtype=torch.long), torch.arange(n), pose(n))
    red, green = images[:, 0], images[:, 1]
    solid, outline, striped, neon = range(n)
    middle = SIZE // 2
    assert red[solid, 8:24, middle].min() > 0.8
    assert red[outline, 10:22, middle].max() < 0.2 < 0.6 < red[outline, middle].max()
    assert red[striped, 8:24, middle].min() < 0.2 < 0.8 < red[striped, 8:24, middle].max()
    assert green[neon, 10:22, middle].min() > 0.6 > green[solid].max()
    faint = (red.flatten(1) > 0.15).sum(1)
    assert faint[neon] > 1.4 * faint[solid]


@pytest.mark.slow
def test_pose_moves_the_digit():
    pictures = scans("train")[0][:1]

    def centre(image):
        mass = image.sum(dim=(0, 1)).float()
        return (mass.sum(0) * torch.arange(64)).sum() / mass.sum(), (mass.sum(1) * torch.arange(64)).sum() / mass.sum()

    middle = pose(1)
    x, y = centre(strokes(pictures, middle))
    moved_x, moved_y = centre(strokes(pictures, middle._replace(shift_x=torch.tensor([2.0]))))
    assert moved_x - x == pytest.approx(4, abs=0.1) and moved_y - y == pytest.approx(0, abs=0.1)
    larger = strokes(pictures, middle._replace(scale=torch.tensor([1.1])))
    smaller = strokes(pictures, middle._replace(scale=torch.tensor([0.85])))
    assert larger.sum() / smaller.sum() == pytest.approx((1.1 / 0.85) ** 2, rel=0.05)
    bolder = strokes(pictures, middle._replace(weight=torch.tensor([0.05])))
    assert bolder.sum() > strokes(pictures, middle).sum()


def test_rotation_is_counter_clockwise():
    bar = torch.zeros(1, 8, 8)
    bar[:, :, 3:5] = 1
    upright = strokes(bar, pose(1))
    turned = strokes(bar, pose(1)._replace(angle=torch.tensor([0.2])))
    top = turned[0, 0, :20].sum(0)
    straight = upright[0, 0, :20].sum(0)
    columns = torch.arange(64)
    assert (top * columns).sum() / top.sum() < (straight * columns).sum() / straight.sum()


def test_wrong_shapes_are_refused():
    one = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(1, 16, 16\)"):
        render(torch.zeros(1, 16, 16), one, one, pose(1))
    with pytest.raises(ValueError, match="2 scans, 1 inks"):
        render(torch.zeros(2, 8, 8), one, one, pose(1))
