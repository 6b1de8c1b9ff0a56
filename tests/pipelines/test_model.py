"""Opening checkpoints: every source, every way a checkpoint can be broken, one precision, and the content hash."""

from __future__ import annotations

import importlib.resources
import json
import shutil
from pathlib import Path
from typing import ClassVar

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file

from sublimate.pipelines.export import export_student
from sublimate.pipelines.locations import packaged_names
from sublimate.pipelines.model import Model, open_model

FAMILIES = ("tiny_sd", "tiny_sd_v", "tiny_unconditional", "tiny_edm", "tiny_sd3", "tiny_sdxl")


@pytest.fixture
def broken(tiny_sd: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "broken"))


def dtypes(model) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters().values()}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_opens_again_bit_for_bit(request, tmp_path, name):
    model = open_model(request.getfixturevalue(name))
    model.pipeline.save_pretrained(tmp_path / "again")
    again = open_model(tmp_path / "again")
    assert again.content_hash() == model.content_hash()
    for key, parameter in model.parameters().items():
        assert torch.equal(parameter, again.parameters()[key])


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_are_frozen_and_in_evaluation_mode(request, name):
    model = open_model(request.getfixturevalue(name))
    assert not any(parameter.requires_grad for parameter in model.parameters().values())
    assert not any(module.training for module in model.components().values())
    assert not any(module.training for module in model.denoiser.modules() if module is not model.denoiser)


def test_a_pipeline_in_training_is_frozen_too(tiny_sd):
    pipeline = open_model(tiny_sd).pipeline
    pipeline.unet.train().requires_grad_(True)
    model = Model(pipeline, "mine")
    assert not model.denoiser.network.training
    assert not any(parameter.requires_grad for parameter in model.parameters().values())


@pytest.mark.slow
def test_opening_is_silent_and_leaves_progress_bars_as_they_were(tiny_sd, tmp_path, capsys):
    capsys.readouterr()
    model = open_model(tiny_sd)
    export_student(model, model.denoiser, tmp_path / "student")
    assert capsys.readouterr() == ("", "")
    assert diffusers.utils.logging.is_progress_bar_enabled()
    diffusers.utils.logging.disable_progress_bar()
    try:
        open_model(tiny_sd)
        assert not diffusers.utils.logging.is_progress_bar_enabled()
    finally:
        diffusers.utils.logging.enable_progress_bar()


def test_keys_name_component_and_parameter(tiny_sd):
    model = open_model(tiny_sd)
    key = "unet/mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    expected = model.pipeline.unet.get_parameter(key.partition("/")[2])
    assert model.parameters()[key] is expected
    assert {key.partition("/")[0] for key in model.parameters()} == {"unet", "text_encoder", "vae"}
    assert model.component("vae") is model.pipeline.vae
    with pytest.raises(ValueError, match="no network 'tokenizer'; it has unet, text_encoder, vae"):
        model.component("tokenizer")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_mixed_precision_opens_in_one(broken, dtype):
    # transformers keeps the precision of the text encoder's file.
    file = broken / "text_encoder" / "model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(half, file, {"format": "pt"})
    config = json.loads((broken / "text_encoder" / "config.json").read_text())
    (broken / "text_encoder" / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert DiffusionPipeline.from_pretrained(broken).text_encoder.dtype == torch.float16
    model = open_model(broken, dtype=dtype)
    assert dtypes(model) == {dtype} == {model.dtype}
    x0 = model.denoiser(torch.zeros(1, *model.latent_shape, dtype=dtype), 999, model.encode_prompts(["a cat"])).x0
    assert x0.dtype == model.decode(x0).dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_variants(request, tmp_path, name):
    folder = request.getfixturevalue(name)
    DiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path / "v", variant="fp16")
    assert open_model(tmp_path / "v", variant="fp16").content_hash() == open_model(folder).content_hash()
    with pytest.raises(ValueError, match=r"are missing \(it has .*fp16.safetensors: pass their variant"):
        open_model(tmp_path / "v")


@pytest.mark.slow
def test_components_without_the_variant_have_plain_weights(tiny_sd, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.save_pretrained(tmp_path)
    for name in ("unet", "text_encoder"):
        shutil.rmtree(tmp_path / name)
    with torch.no_grad():
        next(pipeline.unet.parameters()).zero_()
    pipeline.unet.save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size="40KB")
    pipeline.text_encoder.save_pretrained(tmp_path / "text_encoder")
    ours, stock = open_model(tmp_path, variant="fp16"), DiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    assert ours.content_hash() == Model(stock, "stock").content_hash() != open_model(tiny_sd).content_hash()
    with pytest.raises(ValueError, match="holds no weights of the variant 'bf16': leave it out"):
        open_model(tiny_sd, variant="bf16")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), [("tiny_sd", None), ("tiny_sdxl", None), ("tiny_sdxl", "fp16")])
def test_shards(request, tmp_path, name, variant):
    folder = request.getfixturevalue(name)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "s", max_shard_size="40KB", variant=variant)
    shards = sorted((tmp_path / "s" / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert open_model(tmp_path / "s", variant=variant).content_hash() == open_model(folder).content_hash()
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"{shards[1].name} is missing.*half written"):
        open_model(tmp_path / "s", variant=variant)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".PT"])
@pytest.mark.parametrize("exists", [True, False])
def test_pickled_files_are_refused(tmp_path, suffix, exists):
    file = tmp_path / f"model{suffix}"
    if exists:
        file.write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"is a pickle.*convert it with torch\.load\(path, weights_only=True\)"):
        open_model(file)


def test_a_folder_of_pickles_is_refused(broken):
    (broken / "unet" / "diffusion_pytorch_model.safetensors").rename(broken / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"unet holds its weights as a pickle only.*safe_serialization=True"):
        open_model(broken)


BREAKAGES = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "index cut off": (lambda f: (f / "model_index.json").write_text('{"_class'), r"model_index\.json is damaged"),
    "index without class": (lambda f: (f / "model_index.json").write_text("{}"), "names no pipeline class"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "JSON object"),
    "component missing": (lambda f: shutil.rmtree(f / "vae"), "vae is missing.*half written"),
    "weights missing": (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "weights of .*unet"),
    "text weights missing": (
        lambda f: (f / "text_encoder" / "model.safetensors").unlink(),
        "weights of .*text_encoder",
    ),
    "config missing": (lambda f: (f / "unet" / "config.json").unlink(), r"unet/config\.json is missing"),
    "config cut off": (lambda f: (f / "unet" / "config.json").write_text("{"), r"unet/config\.json is damaged"),
    "scheduler empty": (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler is empty"),
    "tokenizer empty": (lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()], "tokenizer is empty"),
    "sublimate.json cut off": (lambda f: (f / "sublimate.json").write_text("{"), r"sublimate\.json is damaged"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_half_written_folders_are_one_sentence(broken, breakage):
    spoil, message = BREAKAGES[breakage]
    spoil(broken)
    with pytest.raises(ValueError, match=message) as caught:
        open_model(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [4, 100, 2000])
def test_a_truncated_weights_file_is_one_sentence(broken, keep):
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors is damaged") as caught:
        open_model(broken)
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_one_sentence(broken):
    config = broken / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 5}))
    with pytest.raises(ValueError, match="cannot be opened as a StableDiffusionPipeline") as caught:
        open_model(broken)
    assert "\n" not in str(caught.value)


def test_an_unknown_family_is_named(broken):
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    with pytest.raises(
        ValueError, match=r"KandinskyPipeline is not supported; the known pipelines are .*DDIMPipeline"
    ):
        open_model(broken)


@pytest.mark.parametrize("source", ["no/such/folder", "./nothing", "nothing", "/no/where", "model.safetensors"])
def test_a_missing_checkpoint_is_one_sentence(source):
    with pytest.raises(ValueError, match="There is no checkpoint"):
        open_model(source)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt is not a checkpoint"):
        open_model(tmp_path / "notes.txt")
    save_file({"unet.to_k.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="not a whole Stable Diffusion"):
        open_model(tmp_path / "lora.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ValueError, match=r"cut\.safetensors is damaged"):
        open_model(tmp_path / "cut.safetensors")


def test_options_that_a_source_cannot_have_are_refused(tiny_sd, tmp_path):
    with pytest.raises(ValueError, match="local folder"):
        open_model(tiny_sd, revision="main")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no revision and no variant"):
        open_model(tmp_path / "a.safetensors", variant="fp16")


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="The hub cannot be reached and owner/nothing is not in its cache") as caught:
        open_model("owner/nothing")
    assert "\n" not in str(caught.value)


class Answer:
    """As much of a response as the hub's errors look at."""

    headers: ClassVar = {}
    request = None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("no", response=Answer()), "is gated: accept its terms"),
        (RepositoryNotFoundError("no", response=Answer()), "has no model owner/name, or it is private"),
        (RevisionNotFoundError("no", response=Answer()), "has no revision 'v9'"),
        (HTTPError("slow"), "cannot be reached"),
        (HfHubHTTPError("500 it broke\nsorry", response=Answer()), r"cannot be fetched from the hub \(500 it broke\)"),
        (OSError("Could not find the necessary `safetensors` weights"), "as pickles only"),
        (ValueError("\nthe first\nthe second"), r"cannot be fetched from the hub \(the first\)"),
    ],
)
def test_what_the_hub_answers_is_one_sentence(monkeypatch, error, message):
    def download(*_args, **_options):
        # diffusers wraps what the hub answered.
        raise OSError("Cannot load model: the model is not fully cached locally") from error

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    if type(error) in (OSError, ValueError):
        monkeypatch.setattr(DiffusionPipeline, "download", lambda *_args, **_options: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError, match=message) as caught:
        open_model("owner/name", revision="v9")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_packaged_models_are_found_by_name(tiny_sd, tmp_path, monkeypatch):
    assets = tmp_path / "assets"
    shutil.copytree(tiny_sd, assets / "pocket")
    monkeypatch.setattr(importlib.resources, "files", lambda package: assets)
    monkeypatch.chdir(tmp_path)
    assert packaged_names() == ["pocket"]
    assert open_model("pocket").content_hash() == open_model(tiny_sd).content_hash()
    (tmp_path / "pocket").mkdir()
    assert open_model("pocket").source == "pocket"
    with pytest.raises(ValueError, match=r"packaged model \(pocket\)"):
        open_model("purse")


@pytest.mark.slow
def test_the_hash_follows_every_weight_and_comes_back(tiny_sd3):
    model = open_model(tiny_sd3)
    before = model.content_hash()
    assert before == model.content_hash()
    for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        parameter = next(p for p in model.component(name).parameters() if p.numel() > 100)
        original = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[77] += 1e-3
        assert model.content_hash() != before
        with torch.no_grad():
            parameter.copy_(original)
        assert model.content_hash() == before


def test_the_hash_notices_changes_that_bypass_the_version(tiny_sd):
    model = open_model(tiny_sd)
    before = model.content_hash()
    weight = model.pipeline.unet.conv_in.weight
    weight.data += 0.01
    assert model.content_hash() != before


@pytest.mark.slow
def test_the_hash_depends_on_values_names_and_shapes_only(tiny_sd):
    model = open_model(tiny_sd)
    before = model.content_hash()
    weight = model.pipeline.unet.conv_in.weight
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    assert model.content_hash() == before
    assert model.to(dtype=torch.float64).content_hash() == before
    state = model.pipeline.unet.state_dict()
    model.pipeline.unet.load_state_dict(state)
    assert model.content_hash() == before
    assert open_model(tiny_sd, dtype=torch.bfloat16).content_hash() != before


@pytest.mark.slow
def test_different_checkpoints_have_different_hashes(request):
    assert len({open_model(request.getfixturevalue(name)).content_hash() for name in FAMILIES}) == len(FAMILIES)


def test_moving_keeps_the_denoiser_on_the_pipelines_network(tiny_sd):
    model = open_model(tiny_sd)
    assert model.to(dtype=torch.float64) is model
    assert dtypes(model) == {torch.float64}
    assert model.denoiser.network is model.pipeline.unet
    assert isinstance(model.denoiser.network, UNet2DConditionModel)


def test_a_checkpoints_own_defaults(broken):
    assert open_model(broken).guidance_scale == 7.5
    (broken / "sublimate.json").write_text('{"guidance_scale": 3, "steps": 12}')
    model = open_model(broken)
    assert model.guidance_scale == 3
    assert model.defaults["steps"] == 12
