"""Captioned pictures: a folder's rows, the size they get, and damaged ones that are named."""

import os

import numpy as np
import pytest
import torch
from captioned_sets import caption, image_folder
from PIL import Image

from sublimate.training.captioned import Framing, ImageFolder, Images


def ramp(height, width):
    """Red counts columns, green rows."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def corner(image):
    """(left, top) of a crop of `ramp`."""
    return tuple((255 * image[:2, 0, 0]).round().int().tolist())


def test_a_folder_gives_captions_and_pictures_by_row(tmp_path):
    rows = ImageFolder(image_folder(tmp_path, 5))
    assert list(rows.captions) == [caption(i) for i in range(5)]
    assert len(rows) == 5 and rows.picture(3).getpixel((2, 2)) == (9, 9, 9)
    assert list(ImageFolder(tmp_path, None).captions) == []


def test_a_folders_identity_follows_its_pictures(tmp_path):
    before = ImageFolder(image_folder(tmp_path, 3)).identity()
    assert ImageFolder(tmp_path).identity() == before
    os.utime(tmp_path / "2.png", ns=(0, 0))  # as large as before, but another
    changed = ImageFolder(tmp_path).identity()
    assert changed != before
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    assert ImageFolder(tmp_path).identity() not in (before, changed)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", r"Line 2 of .*metadata\.jsonl is not JSON"),
        ('{"text": "a cat"}', r"Line 2 of .* names no picture as file_name"),
        (
            '{"file_name": "1.png", "prompt": "a cat"}',
            r"Line 2 .* no caption column 'text', only file_name, prompt: set",
        ),
        ('{"file_name": "1.png", "text": null}', r"Line 2 of .* has the caption None, which is no text"),
    ],
)
def test_lines_that_cannot_be_used_are_named(tmp_path, line, message):
    image_folder(tmp_path, 1)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write("\n" + line)
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path)


def test_missing_and_empty_metadata_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no metadata\.jsonl: one JSON line with file_name and text"):
        ImageFolder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl is empty"):
        ImageFolder(tmp_path)


def test_damaged_and_missing_pictures_are_named(tmp_path):
    rows = ImageFolder(image_folder(tmp_path, 3))
    whole = (tmp_path / "1.png").read_bytes()
    for content in (b"nothing", whole[: len(whole) // 2]):
        (tmp_path / "1.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"The picture .*1\.png \(line 2 of metadata\.jsonl\) cannot be read"):
            rows.picture(1)
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match=r"There is no picture .*2\.png \(line 3"):
        rows.picture(2)
    with pytest.raises(ValueError, match=r"There is no picture .*2\.png \(line 3"):
        rows.identity()


def test_pictures_turned_by_their_camera_are_upright(tmp_path):
    rows = ImageFolder(image_folder(tmp_path, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    ramp(10, 20).save(tmp_path / "0.png", exif=exif)
    assert rows.picture(0).size == (10, 20)


def test_framing_keeps_the_bytes_of_pictures_that_fit():
    image = Framing(12, 20)(ramp(12, 20), 0)
    assert image.shape == (3, 12, 20)
    assert torch.equal((255 * image[:2]).round().int(), torch.tensor(np.array(ramp(12, 20))[..., :2]).permute(2, 0, 1))


def test_framing_crops_the_middle_or_a_place_that_belongs_to_the_row():
    assert corner(Framing(10, 10, center_crop=True)(ramp(10, 31), 0)) == (10, 0)
    assert corner(Framing(10, 10, center_crop=True)(ramp(30, 10), 0)) == (0, 10)
    places = [corner(Framing(10, 10, seed=1)(ramp(10, 14), row))[0] for row in range(200)]
    assert set(places) == {0, 1, 2, 3, 4} and min(map(places.count, range(5))) > 20
    assert places == [corner(Framing(10, 10, seed=1)(ramp(10, 14), row))[0] for row in range(200)]
    assert places != [corner(Framing(10, 10, seed=2)(ramp(10, 14), row))[0] for row in range(200)]


@pytest.mark.parametrize("size", [(40, 20), (20, 41), (5, 7), (300, 3)])
def test_framing_covers_without_stretching(size):
    image = Framing(16, 12, center_crop=True)(ramp(*size), 0)
    assert image.shape == (3, 16, 12) and image.min() >= 0 and image.max() <= 1
    # One pixel is as many columns of the picture wide as it is rows high.
    steps = 255 * image[0, 8].diff()[2:-2].mean(), 255 * image[1, :, 6].diff()[2:-2].mean()
    if min(size) >= 20:
        assert steps[0] == pytest.approx(float(steps[1]), abs=0.25)


def test_mirrored_images_are_rows_of_their_own(tmp_path):
    rows = ImageFolder(image_folder(tmp_path, 2))
    ramp(16, 16).save(tmp_path / "1.png")
    images = Images(rows, Framing(16, 16), mirrored=True)
    assert len(images) == 4 and images.captions == [caption(i // 2) for i in range(4)]
    pair = images[torch.tensor([2, 3])]
    assert torch.equal(pair[0], pair[1].flip(2)) and not torch.equal(pair[0], pair[1])
    assert images.identity() != Images(rows, Framing(16, 16)).identity() != Images(rows, Framing(16, 8)).identity()
