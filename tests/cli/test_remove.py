"""`sublimate remove`: a picture and a mask in, a picture out."""

import pytest
import torch
from students import with_lora

from sublimate.cli.app import run
from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.attentive_eraser import erase_object
from sublimate.pipelines.edit import open_edited
from sublimate.pipelines.export import export_lora
from sublimate.pipelines.model import open_model
from sublimate.pipelines.pictures import to_png
from sublimate.training.data import read_image


@pytest.fixture
def files(tmp_path):
    picture = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 16, 24)
    mask[:, 4:9, 6:11] = 1
    for name, image in (("picture", picture), ("mask", mask), ("small", mask[..., :8])):
        (tmp_path / f"{name}.png").write_bytes(to_png(image))
    return tmp_path


def remove(*arguments):
    with pytest.raises(SystemExit) as stop:
        run(["remove", *map(str, arguments)])
    return stop.value.code


@pytest.mark.slow
def test_it_writes_what_erase_object_returns(files, tiny_sd):
    out = files / "new" / "removed.png"
    options = ("--steps", 4, "--scale", 3, "--seed", 5, "--dilation", 1, "--inversion", "ddim", "--attention", "math")
    assert remove(tiny_sd, files / "picture.png", files / "mask.png", "--out", out, *options) == 0
    picture, mask = read_image(files / "picture.png")[None], read_image(files / "mask.png")[None, :1]
    (expected,) = erase_object(
        open_model(tiny_sd), picture, mask, steps=4, scale=3, seed=5, dilation=1, inversion="ddim"
    )
    assert (read_image(out) - expected).abs().max() < 0.6 / 255
    assert (read_image(out) - picture[0]).abs().max() > 0.02


@pytest.mark.slow
def test_the_model_is_opened_as_asked(files, tiny_sd):
    model = open_model(tiny_sd)
    lora = export_lora(model, with_lora(model, {}), files / "lora", as_base=True)
    changed = open_model(tiny_sd, loras=[lora])
    edit = UCE().fit(changed, Request((Concept("cat", anchor="dog"),))).save(files / "edit.safetensors")
    out, options = files / "removed.png", ["--steps", 2, "--fuse-lora", lora, "--edit", edit, "--dtype", "bfloat16"]
    assert remove(tiny_sd, files / "picture.png", files / "mask.png", "--out", out, *options) == 0
    picture, mask = read_image(files / "picture.png")[None], read_image(files / "mask.png")[None, :1]
    opened = open_edited(tiny_sd, [edit], loras=[lora], dtype=torch.bfloat16)
    (expected,) = erase_object(opened, picture, mask, steps=2)
    assert (read_image(out) - expected).abs().max() < 0.6 / 255
    plain = erase_object(open_model(tiny_sd, dtype=torch.bfloat16), picture, mask, steps=2)
    assert (read_image(out) - plain[0]).abs().max() > 1 / 255


@pytest.mark.parametrize(
    "mask, out, said",
    [("small", "out.png", "do not fit"), ("mask", "out.jpg", "PNG"), ("none", "out.png", "does not exist")],
)
def test_bad_input_is_one_sentence_and_writes_nothing(capsys, files, tiny_sd, mask, out, said):
    assert remove(tiny_sd, files / "picture.png", files / f"{mask}.png", "--out", files / out) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and said in errors[0]
    assert not (files / out).exists()
