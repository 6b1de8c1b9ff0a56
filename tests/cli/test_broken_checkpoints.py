"""Checkpoints that cannot be opened or used, by command line: one sentence, exit status 1, nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import failed, sublimate
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


def a_shard(folder: Path) -> Path:
    """The second one of the UNet, which now has several."""
    DiffusionPipeline.from_pretrained(folder).unet.save_pretrained(folder / "unet", max_shard_size="40KB")
    (folder / "unet" / WEIGHTS).unlink(missing_ok=True)
    return sorted((folder / "unet").glob("*-of-*.safetensors"))[1]


def cut_short(folder: Path) -> None:
    shard = a_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])


def without_a_shard(folder: Path) -> None:
    a_shard(folder).unlink()


def only_a_variant(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / WEIGHTS.replace(".safetensors", ".fp16.safetensors"))


def losing(name: str, file: Path) -> None:
    """A file without one of its weights."""
    save_file({key: value for key, value in load_file(file).items() if key != name}, file, {"format": "pt"})


def a_shard_losing_a_weight(folder: Path) -> None:
    shard = a_shard(folder)
    losing(next(iter(load_file(shard))), shard)


def a_text_encoder_losing_a_weight(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    losing(next(key for key in load_file(file) if key.endswith("layers.1.mlp.fc1.weight")), file)


def without_words(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    assert (folder / "tokenizer" / "tokenizer_config.json").is_file()


def called_xl(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))


def told_of_a_transformer(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))


def of_another_class(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))


def with_nan(folder: Path) -> None:
    weights = load_file(folder / "unet" / WEIGHTS)
    weights["conv_out.bias"][0] = torch.nan
    save_file(weights, folder / "unet" / WEIGHTS, {"format": "pt"})


def of_large_numbers(folder: Path) -> None:
    """An autoencoder whose activations leave float16's range, as that of Stable Diffusion XL do."""
    weights = load_file(folder / "vae" / WEIGHTS)
    weights["post_quant_conv.weight"] *= 3e4
    weights["decoder.conv_in.weight"] *= 3e4
    save_file(weights, folder / "vae" / WEIGHTS, {"format": "pt"})


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "corrupt shard": (cut_short, r"diffusion_pytorch_model-00002-of-0000\d.safetensors is damaged"),
    "missing shard": (without_a_shard, "is missing, so the checkpoint is only half written"),
    "missing component": (lambda folder: shutil.rmtree(folder / "vae"), "vae is missing"),
    "other variant": (only_a_variant, "pass their variant"),
    "shard losing a weight": (a_shard_losing_a_weight, r"lacks .*, which its index says it has"),
    "UNet losing a weight": (
        lambda folder: losing("mid_block.resnets.0.conv1.weight", folder / "unet" / WEIGHTS),
        r"The unet of .* lacks mid_block\.resnets\.0\.conv1\.weight: get the checkpoint again",
    ),
    "text encoder losing a weight": (a_text_encoder_losing_a_weight, r"The text_encoder of .* lacks .*fc1\.weight"),
    "tokenizer without words": (without_words, "tokenizer has no words"),
    "of a larger family by name": (called_xl, "This StableDiffusionXLPipeline has no text_encoder_2"),
    "of an unlike family by name": (told_of_a_transformer, "cannot be opened as a FluxPipeline|is of class"),
    "unknown family": (of_another_class, "KandinskyPipeline is not supported; the known pipelines are"),
}


@pytest.fixture
def broken(tiny_sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd, tmp_path / "broken"))


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_every_command_says_in_one_sentence_what_is_wrong(capsys, broken, tmp_path, name):
    spoil, said = BROKEN[name]
    spoil(broken)
    out = tmp_path / "out"
    commands = [
        ["generate", broken, "a cat", "--out", out],
        ["erase", broken, "cat", "--anchor", "dog", "--out", out],
        ["distill", "demo", f"model={broken}", f"trainer.output_dir={out}"],
        ["evaluate", broken, "--out", out / "found.json"],
    ]
    for command in commands:
        assert_said(said, failed(capsys, *command))
    assert not out.exists()


def assert_said(pattern: str, sentence: str) -> None:
    assert re.search(pattern, sentence), sentence


def test_an_unreachable_hub(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in (["generate", "owner/nothing", "a cat"], ["distill", "demo", "model=owner/nothing"]):
        assert "The hub cannot be reached and owner/nothing is not in its cache" in failed(capsys, *command)
    assert "ink is a local folder: it has no revision 'main'" in failed(
        capsys, "generate", "ink", "a seven", "--revision", "main"
    )


@pytest.mark.slow
def test_a_variant_is_chosen_by_option(capsys, broken, tmp_path):
    for component in ("unet", "vae", "text_encoder"):
        for file in (broken / component).glob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))
    draw = ["generate", broken, "a cat", "--steps", "1", "--out", tmp_path / "out"]
    assert "pass their variant" in failed(capsys, *draw)
    assert sublimate(capsys, *draw, "--variant", "fp16")[0] == 0
    edit = ["erase", broken, "cat", "--anchor", "dog", "--out", tmp_path / "edit", "--variant", "fp16"]
    assert sublimate(capsys, *edit)[0] == 0
    distill = ["distill", "demo", f"model={broken}", "variant=fp16", "data.prompts=nowhere.txt"]
    assert "There is no prompt file nowhere.txt" in failed(capsys, *distill)  # the model is open by then
    other = ["distill", "demo", f"model={broken}", "variant=bf16"]
    assert "it has model.fp16.safetensors: pass their variant" in failed(capsys, *other)


@pytest.mark.slow
def test_numbers_that_leave_float16(capsys, broken, tmp_path):
    of_large_numbers(broken)
    draw = ["generate", broken, "a cat", "--steps", "1", "--out", tmp_path / "out", "--dtype"]
    said = failed(capsys, *draw, "float16")
    assert "The images of" in said and "overflow float16 (beyond 65504): open it in bfloat16 or float32." in said
    assert not (tmp_path / "out").exists()
    for precision in ("bfloat16", "float32"):
        assert sublimate(capsys, *draw, precision)[0] == 0


def test_weights_that_are_no_numbers(capsys, broken):
    with_nan(broken)
    said = failed(capsys, "generate", broken, "a cat", "--steps", "1")
    assert "The latents of" in said and "not finite in float32: its weights, or an edit of them, are damaged" in said
