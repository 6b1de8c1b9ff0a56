"""`sublimate generate` with a size, a picture and a mask."""

from __future__ import annotations

import shutil

import pytest
import torch
from commands import failed, sublimate

from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.pipelines.pictures import to_png
from sublimate.pipelines.sampling import initial_noise
from sublimate.training.data import read_image

DRAW = ("--steps", 2, "--guidance-scale", 1)


@pytest.fixture
def files(tmp_path):
    """Pictures of 16 by 16 pixels, their masks, and a wide one."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(3, 16, 16)
    mask[:, 4:12, 7:] = 1
    for name, image in {
        "a": torch.rand((3, 16, 16), generator=generator),
        "b": torch.rand((3, 16, 16), generator=generator),
        "mask": mask,
        "wide": torch.rand((3, 8, 12), generator=generator),
    }.items():
        (tmp_path / f"{name}.png").write_bytes(to_png(image))
    return tmp_path


@pytest.fixture
def drawn(capsys, tmp_path):
    """Draws by the command, (images, 3, height, width)."""

    def draw(*arguments):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        status, _, err = sublimate(capsys, "generate", *arguments, *DRAW, "--out", out)
        assert status == 0, err
        return torch.stack([read_image(path) for path in sorted(out.glob("0*.png"))])

    return draw


def near(found, expected):
    assert found.shape == expected.shape
    return (found - expected).abs().max() < 0.6 / 255


@pytest.mark.slow
def test_a_size(drawn, tiny_sd):
    assert near(
        drawn(tiny_sd, "a cat", "--height", 24, "--width", 32),
        generate(open_model(tiny_sd), ["a cat"], steps=2, guidance_scale=1, height=24, width=32),
    )


@pytest.mark.slow
def test_a_size_that_the_model_cannot_draw(capsys, tiny_sd):
    assert "a multiple of 2 pixels, not 25" in failed(capsys, "generate", tiny_sd, "a cat", "--height", 25)


def test_pictures_are_painted_in(drawn, files, tiny_inpainting):
    model = open_model(tiny_inpainting)
    asked = [tiny_inpainting, "a cat", "a dog", "--count", 2]
    masked = ["--mask", files / "mask.png"]
    both = torch.stack([read_image(files / f"{name}.png") for name in "aabb"])
    mask = read_image(files / "mask.png")[None, :1]
    options = {"steps": 2, "guidance_scale": 1}
    prompts = ["a cat", "a cat", "a dog", "a dog"]
    expected = generate(model, prompts, shown=model.show(images=both, masks=mask), **options)
    assert near(drawn(*asked, "--image", files / "a.png", "--image", files / "b.png", *masked), expected)
    expected = generate(model, prompts, shown=model.show(images=both[:1], masks=mask), **options)
    assert near(drawn(*asked, "--image", files / "a.png", *masked), expected)
    assert not near(expected, generate(model, prompts, **options))


def test_pictures_are_framed_and_masks_with_them(drawn, files, tiny_inpainting):
    model = open_model(tiny_inpainting)
    size = {"height": 24, "width": 16}
    white = torch.zeros(3, 16, 12)
    white[:, :8] = 1
    for name, picture in (("black", torch.zeros_like(white)), ("half", white)):
        (files / f"{name}.png").write_bytes(to_png(picture))
    masks = torch.zeros(1, 1, 24, 16)
    masks[:, :, :12] = 1
    shown = model.show(images=torch.zeros(1, 3, 24, 16), masks=masks)
    found = drawn(tiny_inpainting, "cat", "--image", files / "black.png", "--mask", files / "half.png", "--height", 24)
    assert near(found, generate(model, ["cat"], steps=2, guidance_scale=1, shown=shown, **size))


def test_prompts_alone_are_painted_in_any_size(drawn, tiny_inpainting):
    assert drawn(tiny_inpainting, "a cat", "--height", 24, "--width", 32).shape == (1, 3, 24, 32)
    assert near(
        drawn(tiny_inpainting, "a cat", "--height", 16),
        generate(open_model(tiny_inpainting), ["a cat"], steps=2, guidance_scale=1),
    )


def test_pictures_are_enlarged(drawn, files, tiny_upscaling):
    asked = [tiny_upscaling, "a cat", "--image", files / "wide.png"]
    once = drawn(*asked)
    assert once.shape == (1, 3, 16, 24)
    both = drawn(*asked, "--count", 2)
    assert torch.equal(both[:1], once) and not torch.equal(both[0], both[1])
    assert not torch.equal(drawn(*asked, "--seed", 1), once)
    assert not torch.equal(
        drawn(tiny_upscaling, "a cat", "--image", files / "a.png", "--height", 16, "--width", 24), once
    )
    assert drawn(*asked, "--height", 32, "--width", 16).shape == (1, 3, 32, 16)
    several = ["--image", files / "wide.png", "--image", files / "a.png", "--height", 16, "--width", 24]
    assert near(drawn(tiny_upscaling, "a cat", "a dog", *several)[:1], once)


def test_noise_on_small_pictures_is_none_of_the_initial_noise(files, tiny_upscaling, monkeypatch, drawn):
    shown = []
    own = type(open_model(tiny_upscaling)).show
    monkeypatch.setattr(
        "sublimate.pipelines.model.Model.show", lambda model, **p: shown.append(p["noise"]) or own(model, **p)
    )
    drawn(tiny_upscaling, "a cat", "--image", files / "wide.png", "--count", 2)
    (noise,) = shown
    initial = initial_noise((4, 8, 12), 0, [0, 1])[:, :3]
    assert noise.shape == initial.shape
    assert torch.corrcoef(torch.stack([noise.flatten(), initial.flatten()]))[0, 1].abs() < 0.2


@pytest.mark.slow
def test_pictures_that_do_not_apply(capsys, files, tiny_sd, tiny_inpainting, tiny_upscaling):
    image, mask = ("--image", files / "a.png"), ("--mask", files / "mask.png")
    wide = ("--image", files / "wide.png")

    def said(model, *arguments):
        return failed(capsys, "generate", model, "a cat", *arguments)

    assert "is shown no pictures: leave out" in said(tiny_sd, *image)
    assert "is shown no pictures: leave out" in said(tiny_sd, *mask)
    assert "go together" in said(tiny_inpainting, *image)
    assert "go together" in said(tiny_inpainting, *mask)
    assert "a.png another size" in said(tiny_inpainting, *image, "--mask", files / "wide.png")
    assert "--image is given once, or once per prompt (1), not 2" in said(tiny_inpainting, *image, *image, *mask)
    assert "--mask is given once, or once per prompt (2), not 3" in said(
        tiny_inpainting, "a dog", *image, *mask, *mask, *mask
    )
    assert "give --image, and no --mask" in said(tiny_upscaling)
    assert "give --image, and no --mask" in said(tiny_upscaling, *image, *mask)
    assert "differ in size" in said(tiny_upscaling, "a dog", *image, *wide)
    assert "no picture" in said(tiny_upscaling, "--image", files / "missing.png")
    assert "a multiple of 2 pixels, not 25" in said(tiny_inpainting, *image, *mask, "--height", 25)
