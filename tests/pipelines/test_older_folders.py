"""Folders that diffusers 0.30 wrote, and what checkpoints bring that only stock pipelines read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from older_folders import add_safety_checker, as_of_0_30
from safetensors.torch import load_file
from students import student_of

from sublimate.pipelines.edit import Edit
from sublimate.pipelines.export import export_student, save_model
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.pipelines.shapes import open_shapes

KEPT = ("safety_checker", "feature_extractor")


@pytest.fixture
def guarded(tiny_sd: Path, tmp_path: Path) -> Path:
    """Stable Diffusion with a safety checker that finds everything unsafe."""
    return add_safety_checker(Path(shutil.copytree(tiny_sd, tmp_path / "guarded")), alarmed=True)


def index_of(folder: Path) -> dict:
    return json.loads((folder / "model_index.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux"])
def test_a_folder_of_diffusers_0_30_is_the_same_model(request, tmp_path, name, capsys):
    today = request.getfixturevalue(name)
    folder = as_of_0_30(Path(shutil.copytree(today, tmp_path / "older")))
    if name == "tiny_sd":
        add_safety_checker(folder)
    capsys.readouterr()
    old, new = open_model(folder), open_model(today)
    assert capsys.readouterr() == ("", "")
    assert old.content_hash() == new.content_hash()
    drawn = generate(old, ["a red cat"], steps=2)
    assert torch.equal(drawn, generate(new, ["a red cat"], steps=2))
    assert open_shapes(folder).parameters().keys() == old.parameters().keys()
    # Written again, it is a folder of today.
    again = open_model(save_model(old, tmp_path / "again"))
    assert torch.equal(generate(again, ["a red cat"], steps=2), drawn)


@pytest.mark.slow
def test_a_safety_checker_stays_on_disk_and_exports_carry_it_on(guarded, tmp_path, caplog):
    model = open_model(guarded)
    assert not caplog.records
    assert model.pipeline.safety_checker is None and model.pipeline.feature_extractor is None
    folders = [
        export_student(model, student_of(model), tmp_path / "student"),
        save_model(model, tmp_path / "saved"),
        Edit(values={"unet/conv_in.bias": torch.ones(8)}).fold(model, tmp_path / "edited", allow_other_base=True),
    ]
    for folder in folders:
        for entry in (*KEPT, "requires_safety_checker"):
            assert index_of(folder)[entry] == index_of(guarded)[entry]
        for kept in KEPT:
            for file in (guarded / kept).iterdir():
                assert (folder / kept / file.name).read_bytes() == file.read_bytes() or file.suffix == ".json"
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        result = pipeline("a cat", num_inference_steps=1, guidance_scale=1.0, output_type="np")
        assert result.nsfw_content_detected == [True] and not result.images.any()
        # Ours draws what the checker would hide, and so tells what is in the weights.
        assert generate(open_model(folder), ["a cat"], steps=1).any()


@pytest.mark.slow
def test_what_a_pipeline_does_not_call_optional_is_opened(tiny_audio):
    model = open_model(tiny_audio)
    assert model.carried is None and model.pipeline.feature_extractor is not None


@pytest.mark.slow
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_carried_weights_are_copied_under_their_plain_names(guarded, tmp_path, variant):
    pipeline = DiffusionPipeline.from_pretrained(guarded)
    pipeline.save_pretrained(tmp_path / "source", variant=variant, max_shard_size="6KB")
    source = tmp_path / "source"
    shards = list((source / "safety_checker").glob("*-of-*.safetensors"))
    assert len(shards) > 1 and all((variant or "") in path.name for path in shards)
    index = index_of(source) | {"feature_extractor": ["transformers", "CLIPFeatureExtractor"]}
    (source / "model_index.json").write_text(json.dumps(index))
    folder = save_model(open_model(source, variant=variant), tmp_path / "saved")
    assert not [path for path in (folder / "safety_checker").iterdir() if "fp16" in path.name]
    # A class that transformers has renamed since, and that stock diffusers would not find.
    assert index_of(folder)["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    again = DiffusionPipeline.from_pretrained(folder).safety_checker.state_dict()
    for name, value in pipeline.safety_checker.state_dict().items():
        assert torch.equal(again[name], value)


def test_a_checker_that_went_missing_is_one_sentence(guarded, tmp_path):
    model = open_model(guarded)
    shutil.rmtree(guarded / "safety_checker")
    with pytest.raises(ValueError, match="safety_checker is missing"):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="safety_checker is missing, so the checkpoint is only half written"):
        open_model(guarded)


@pytest.mark.slow
def test_weights_too_large_for_a_precision_are_not_saved_in_it(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    student = student_of(model)
    with torch.no_grad():
        student.network.conv_out.bias[0] = 1e6
    with pytest.raises(ValueError, match=r"conv_out\.bias of unet holds numbers too large for float16: save it in bf"):
        export_student(model, student, tmp_path / "student", dtype=torch.float16)
    assert not (tmp_path / "student").exists()
    folder = export_student(model, student, tmp_path / "student", dtype=torch.bfloat16)
    assert load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_out.bias"].isfinite().all()
