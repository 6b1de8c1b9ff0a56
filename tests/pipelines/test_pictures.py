"""PNG bytes and grids hold exactly the pixels they were given."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from sublimate.pipelines.pictures import image_grid, pictures_of, to_png


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png)))


def test_png_holds_the_pixels_rounded_to_bytes():
    off = torch.tensor([-0.4, 0.4]).repeat(12).reshape(3, 2, 4)
    image = (torch.arange(24).reshape(3, 2, 4) + off) / 255
    assert (opened(to_png(image.requires_grad_())) == np.arange(24).reshape(3, 2, 4).transpose(1, 2, 0)).all()
    extreme = torch.tensor([-0.5, 0.0, 1.0, 1.5]).expand(3, 1, 4)
    assert opened(to_png(extreme))[0, :, 0].tolist() == [0, 0, 255, 255]


def test_scaling_repeats_pixels():
    image = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0))
    assert (opened(to_png(image, scale=4)) == opened(to_png(image)).repeat(4, axis=0).repeat(4, axis=1)).all()


def test_large_pictures_are_shrunk_and_small_ones_are_not():
    image = torch.rand(3, 20, 40, generator=torch.Generator().manual_seed(0))
    assert opened(to_png(image, largest=10)).shape == (5, 10, 3)
    assert (opened(to_png(image, largest=40)) == opened(to_png(image))).all()


def test_grid_places_images_row_by_row():
    images = torch.arange(5.0)[:, None, None, None].expand(5, 3, 2, 3)
    grid = image_grid(images, columns=2, gap=1, background=9)
    nines = [9.0] * 3
    expected = [
        [*[0.0] * 3, 9, *[1.0] * 3],
        [*[0.0] * 3, 9, *[1.0] * 3],
        [*nines, 9, *nines],
        [*[2.0] * 3, 9, *[3.0] * 3],
        [*[2.0] * 3, 9, *[3.0] * 3],
        [*nines, 9, *nines],
        [*[4.0] * 3, 9, *nines],
        [*[4.0] * 3, 9, *nines],
    ]
    assert grid[0].tolist() == expected and torch.equal(grid[0], grid[2])
    assert image_grid(images[:4], gap=0).shape == (3, 4, 6)


def test_spectrograms_are_drawn_with_time_to_the_right_and_low_notes_at_the_bottom():
    spectrogram = torch.tensor([[-3.0, 1.0], [-1.0, 0.0], [0.0, -2.0]])[None, None]  # three frames of two bins
    picture = pictures_of(spectrogram, "audio")
    assert picture.shape == (1, 3, 2, 3)
    assert picture[0, 0].tolist() == [[1.0, 0.75, 0.25], [0.0, 0.5, 0.75]]
    images = torch.rand(2, 3, 4, 4)
    assert pictures_of(images, "image") is images


def test_what_is_no_picture_is_refused():
    with pytest.raises(ValueError, match=r"got \(1, 2, 2\)"):
        to_png(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="not finite"):
        to_png(torch.full((3, 2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"got shape \(0, 3, 2, 2\)"):
        image_grid(torch.zeros(0, 3, 2, 2))
