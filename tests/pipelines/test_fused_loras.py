"""Bases with a LoRA in their weights: saved so, or added when opened; then they are models as any other."""

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from students import with_lora

from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.export import export_lora, export_student, save_model
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.generate import generate
from sublimate.pipelines.lora_files import LORA_FILE
from sublimate.pipelines.model import open_model
from sublimate.pipelines.sampling import image_generator
from sublimate.training.players import PlayerConfig, make_player


@pytest.fixture(scope="module")
def lora(tiny_sd_v, tmp_path_factory):
    """A folder with a LoRA of the UNet."""
    model = open_model(tiny_sd_v)
    player = make_player(model.denoiser, PlayerConfig(kind="lora", rank=2, lora_alpha=3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in player.trainable().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return export_lora(model, player.module, tmp_path_factory.mktemp("lora") / "lora", as_base=True)


def stock(folder):
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def said(pipeline):
    text = pipeline.encode_prompt("a cat", "cpu", 1, False)[0]
    return pipeline.unet(torch.ones(1, 4, 8, 8), 500, text).sample


def predicted(model):
    with torch.no_grad():
        return model.denoiser(torch.ones(1, *model.latent_shape), 500.0, model.encode_prompts(["a cat"])).output


@pytest.mark.slow
def test_a_lora_is_in_the_weights_as_stock_diffusers_adds_it(tiny_sd_v, lora, tmp_path):
    pipeline = stock(tiny_sd_v)
    plain = said(pipeline)
    pipeline.load_lora_weights(lora)
    loaded = said(pipeline)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "fused")
    opened = open_model(tiny_sd_v, loras=[lora])
    assert opened.content_hash() == open_model(tmp_path / "fused").content_hash()
    assert open_model(tiny_sd_v, loras=[lora / LORA_FILE]).content_hash() == opened.content_hash()
    assert not any("lora" in name for name in opened.parameters())
    torch.testing.assert_close(predicted(opened), loaded, rtol=1e-4, atol=1e-5)
    assert (predicted(opened) - plain).abs().max() > 1e-2


@pytest.mark.slow
def test_a_lora_is_added_with_a_scale_as_stock_diffusers_does(tiny_sd_v, lora, tmp_path):
    pipeline = stock(tiny_sd_v)
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "fused")
    opened = open_model(tiny_sd_v, loras=[f"{lora}@0.7"])
    assert opened.content_hash() == open_model(tmp_path / "fused").content_hash()
    named = open_model(tiny_sd_v, loras=[f"{lora}:{LORA_FILE}@0.7"])
    assert named.content_hash() == opened.content_hash() != open_model(tiny_sd_v, loras=[lora]).content_hash()
    edit = UCE().fit(named, Request((Concept("cat", anchor="dog"),)))
    assert edit.provenance["base"]["loras"] == [f"lora:{LORA_FILE}@0.7"]


@pytest.mark.slow
def test_a_students_lora_is_sampled_as_the_student(tiny_sd_v, tmp_path):
    model = open_model(tiny_sd_v)
    student = with_lora(model, {})
    folder = export_lora(model, student, tmp_path / "lora", t=600)
    whole = open_model(export_student(model, student, tmp_path / "whole", t=600))
    opened = open_model(tiny_sd_v, loras=[folder])
    assert opened.is_student and opened.loras == (str(folder),)
    torch.testing.assert_close(generate(opened, ["a cat"]), generate(whole, ["a cat"]), rtol=1e-4, atol=1e-5)
    assert not open_model(tiny_sd_v, loras=[folder / LORA_FILE]).is_student
    assert open_model(tiny_sd_v, loras=[f"{folder}@0.9"]).is_student


@pytest.mark.slow
@pytest.mark.parametrize("few", [None, FewSteps("consistency", steps=2, grid_steps=50)])
def test_a_base_with_a_students_lora_is_saved_as_the_student(tiny_sd_v, tmp_path, few):
    model = open_model(tiny_sd_v)
    start = {"t": 600} if few is None else {"few_steps": few}
    opened = open_model(tiny_sd_v, loras=[export_lora(model, with_lora(model, {}), tmp_path / "lora", **start)])
    folder = save_model(opened, tmp_path / "saved")
    again, pipeline = open_model(folder), stock(folder)
    assert again.defaults["start"] == opened.defaults["start"]
    drawn = generate(opened, ["a cat"], seed=3)
    assert torch.equal(generate(again, ["a cat"], seed=3), drawn)
    pipeline.set_progress_bar_config(disable=True)
    call = again.defaults["call"] | {"generator": image_generator(3, 0), "output_type": "pt"}
    torch.testing.assert_close(pipeline("a cat", **call).images, drawn, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_it_trains_and_is_edited_as_any_other(tiny_sd_v, lora, tmp_path):
    model = open_model(tiny_sd_v, loras=[lora, lora])
    before = predicted(model)
    torch.testing.assert_close(predicted(model), make_player_says(model), rtol=0, atol=0)
    edit = UCE().fit(model, Request((Concept("cat", anchor="dog"),)))
    with edit.applied(model):
        assert not torch.equal(predicted(model), before)
    assert torch.equal(predicted(model), before)
    with pytest.raises(ValueError, match="was made for"):
        edit.apply(open_model(tiny_sd_v))


def make_player_says(model):
    """What a LoRA player says before its first step, which is what the model says."""
    player = make_player(model.denoiser, PlayerConfig(kind="lora", rank=2))
    with torch.no_grad():
        return player.module(torch.ones(1, *model.latent_shape), 500.0, model.encode_prompts(["a cat"])).output


def test_what_is_no_lora_of_it_is_refused(tiny_sd_v, tiny_dit, lora, tmp_path):
    with pytest.raises(ValueError, match="is a pickle"):
        open_model(tiny_sd_v, loras=[tmp_path / "lora.ckpt"])
    with pytest.raises(ValueError, match="cannot be opened as a LoRA"):
        open_model(tiny_sd_v, loras=[tmp_path / "missing.safetensors"])
    with pytest.raises(ValueError, match="takes no LoRAs"):
        open_model(tiny_dit, loras=[lora])
    other = {"transformer.x.lora_A.weight": torch.ones(1, 4), "transformer.x.lora_B.weight": torch.ones(4, 1)}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"cannot be opened|Nothing of the LoRA"):
        open_model(tiny_sd_v, loras=[tmp_path / "other.safetensors"])


@pytest.mark.slow
def test_a_folder_saved_with_its_adapters_says_what_to_do(tiny_sd_v, lora, tmp_path):
    pipeline = stock(tiny_sd_v)
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora()
    pipeline.save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match=r"call pipeline.unload_lora_weights\(\)"):
        open_model(tmp_path / "half")
