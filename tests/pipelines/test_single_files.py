"""Checkpoints of one file: which family they are of, and opening them without the hub."""

from __future__ import annotations

import shutil

import diffusers
import pytest
import torch
from checkpoints.sdxl import sdxl
from safetensors.torch import load_file, save_file
from single_files import save_single_file

from sublimate.pipelines.export import save_model
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.pipelines.single_files import single_file_family

SDXL_MARK = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
SD3_MARK = "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ({"model.diffusion_model.out.2.bias": (4,)}, "StableDiffusion"),
        (
            {"model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (2, 1024)},
            "StableDiffusion",
        ),
        ({"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3)}, "StableDiffusionInpaint"),
        ({"model.diffusion_model.input_blocks.10.0.skip_connection.bias": (4,)}, "StableDiffusionUpscale"),
        ({SD3_MARK: (9216,), "model.diffusion_model.pos_embed": (1, 36864, 1)}, "StableDiffusion3"),
        ({SDXL_MARK: (1280,), "model.diffusion_model.out.2.bias": (4,)}, "StableDiffusionXL"),
    ],
)
def test_single_files_are_recognised_by_their_header(tmp_path, monkeypatch, shapes, kind):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    assert single_file_family(tmp_path / "model.safetensors") == f"{kind}Pipeline"

    def offline(*_args, **_options):
        raise OSError("no network\nat all")

    monkeypatch.setattr(getattr(diffusers, f"{kind}Pipeline"), "from_single_file", offline)
    second = any("attn2" in name for name in shapes)
    message = (
        "does not say whether" if second else r"which the hub gives, or a diffusers folder as config \(no network\)"
    )
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path / "model.safetensors")
    if second:
        save_file(
            {"v_pred": torch.zeros(0), **{n: torch.zeros(s) for n, s in shapes.items()}}, tmp_path / "v.safetensors"
        )
        with pytest.raises(ValueError, match="which the hub gives"):
            open_model(tmp_path / "v.safetensors")


@pytest.mark.parametrize("name", [SDXL_MARK, SDXL_MARK.replace("embedders.1", "embedders.0"), "weight", SD3_MARK])
def test_single_files_of_other_families_are_refused(tmp_path, name):
    save_file({name: torch.zeros(9216)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a whole Stable Diffusion 1, 2, 3 or XL checkpoint"):
        open_model(tmp_path / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_a_single_file_opens_without_the_hub(request, tmp_path, name):
    folder = request.getfixturevalue(name)
    pipeline = open_model(folder).pipeline
    if name == "tiny_sdxl":
        # Real ones are recognised by the tenth layer of their second encoder.
        pipeline = sdxl(pipeline.scheduler, layers=10)
        pipeline.save_pretrained(folder := tmp_path / "folder")
    file = save_single_file(pipeline, tmp_path / "model.safetensors")
    whole = open_model(folder)
    # The configuration and the tokenizers are enough.
    for weights in folder.rglob("*.safetensors") if name == "tiny_sdxl" else ():
        weights.unlink()
    model = open_model(file, config=folder)
    assert model.content_hash() == whole.content_hash()
    drawn = generate(model, ["a cat"], steps=2)
    torch.testing.assert_close(drawn, generate(whole, ["a cat"], steps=2), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"There is no checkpoint .*nowhere: give a diffusers folder"):
        open_model(file, config=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="leave out config"):
        open_model(folder, config=folder)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("marks", [["v_pred"], ["v_pred", "ztsnr"], ["ztsnr"]])
def test_marks_say_what_the_network_predicts(tiny_sd, tmp_path, marks, whole):
    pipeline = open_model(tiny_sd).pipeline
    file = save_single_file(pipeline, tmp_path / "model.safetensors")
    states = {name: t for name, t in load_file(file).items() if whole or not name.startswith("cond_stage_model.")}
    save_file({**states, **{name: torch.zeros(0) for name in marks}}, file)
    model = open_model(file, config=tiny_sd)
    velocity = "v_pred" in marks
    assert model.denoiser.parametrization.kind == ("v_prediction" if velocity else "epsilon")
    assert model.schedule.zero_terminal == (marks == ["v_pred", "ztsnr"])
    again = open_model(save_model(model, tmp_path / "saved"))
    assert again.denoiser.parametrization == model.denoiser.parametrization
    torch.testing.assert_close(generate(again, ["a cat"], steps=2), generate(model, ["a cat"], steps=2))


@pytest.mark.slow
def test_a_scheduler_keeps_what_marks_do_not_speak_of(tiny_sdxl, tmp_path):
    folder = tmp_path / "folder"
    sdxl(open_model(tiny_sdxl).pipeline.scheduler, layers=10).save_pretrained(folder)
    file = save_single_file(open_model(folder).pipeline, tmp_path / "model.safetensors")
    save_file({**load_file(file), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, file)
    own, scheduler = open_model(folder).pipeline.scheduler, open_model(file, config=folder).pipeline.scheduler
    assert type(scheduler) is type(own)
    changed = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert {**own.config, **changed} == {**scheduler.config}


LOST = {
    "model.diffusion_model.middle_block.0.in_layers.2.weight": "it needs all weights",
    "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight": r"The text_encoder of .* lacks .*\.fc1",
    "first_stage_model.": "is not the whole checkpoint",
}


@pytest.mark.slow
@pytest.mark.parametrize("lost", LOST)
def test_a_single_file_that_lacks_weights_is_one_sentence(tiny_sd, tmp_path, lost):
    file = save_single_file(open_model(tiny_sd).pipeline, tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.startswith(lost)}, file)
    with pytest.raises(ValueError, match=LOST[lost]) as caught:
        open_model(file, config=tiny_sd)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_what_a_file_without_text_encoders_lacks_comes_from_a_folder(tiny_sd, tmp_path):
    base, tuned = open_model(tiny_sd), open_model(tiny_sd)
    with torch.no_grad():
        for part in (tuned.pipeline.unet.conv_in, tuned.pipeline.vae.decoder.conv_in):
            part.bias.add_(1)
    file = save_single_file(tuned.pipeline, tmp_path / "model.safetensors")
    states = load_file(file)
    for left_out, expected in (("cond_stage_model.", tuned), (("cond_stage_model.", "first_stage_model."), base)):
        save_file({name: tensor for name, tensor in states.items() if not name.startswith(left_out)}, file)
        found = open_model(file, config=tiny_sd)
        assert torch.equal(found.pipeline.unet.conv_in.bias, tuned.pipeline.unet.conv_in.bias)
        assert torch.equal(found.pipeline.vae.decoder.conv_in.bias, expected.pipeline.vae.decoder.conv_in.bias)
        assert torch.equal(found.encode_prompts(["cat"])["text"], base.encode_prompts(["cat"])["text"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny_flux", "tiny_sd3", "tiny_sana"])
def test_a_transformer_of_one_file_opens_with_the_parts_of_a_folder(request, tmp_path, family):
    folder = request.getfixturevalue(family)
    whole = open_model(folder)
    with torch.no_grad():
        next(whole.denoiser.network.parameters()).add_(0.1)
    file = tmp_path / "tuned.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in whole.denoiser.network.state_dict().items()}, file)
    parts = shutil.copytree(folder, tmp_path / "parts")
    for weights in (parts / "transformer").glob("*.safetensors"):  # not needed, and large
        weights.unlink()
    model = open_model(file, config=parts, dtype=torch.bfloat16)
    assert model.content_hash() == whole.to(dtype=torch.bfloat16).content_hash()
    states = load_file(file)
    states.pop(lost := next(name for name in states if name.endswith("proj_out.weight")))
    save_file(states, file)
    with pytest.raises(
        ValueError, match=rf"tuned\.safetensors (has no transformer of the kind|lacks {lost})"
    ) as caught:
        open_model(file, config=parts)
    assert "\n" not in str(caught.value)


def test_a_network_of_another_kind_than_the_folders_is_one_sentence(tiny_sd, tiny_sd3, tiny_audio, tmp_path):
    file = save_single_file(open_model(tiny_sd).pipeline, tmp_path / "model.safetensors")
    save_file({name: t for name, t in load_file(file).items() if name.startswith("model.diffusion_model.")}, file)
    with pytest.raises(ValueError, match=f"has no transformer of the kind that {tiny_sd3} has") as caught:
        open_model(file, config=tiny_sd3)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="diffusers reads no single files of a AudioLDM2UNet2DConditionModel"):
        open_model(file, config=tiny_audio)


def test_a_single_file_of_another_architecture_is_one_sentence(tiny_sd, tiny_sd3, tmp_path):
    file = save_single_file(open_model(tiny_sd).pipeline, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"configuration, not that of {tiny_sd3}") as caught:
        open_model(file, config=tiny_sd3)
    assert "\n" not in str(caught.value)
