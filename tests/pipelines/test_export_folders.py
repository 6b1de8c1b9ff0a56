"""What exports leave on disk: complete folders or none, and cards that say what may be said."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file

from sublimate.pipelines.cards import inherited_license, model_card
from sublimate.pipelines.export import export_lora, export_student
from sublimate.pipelines.folders import written_aside
from sublimate.pipelines.model import open_model
from sublimate.training.config import dump_config
from sublimate.training.distill import DistillConfig


@pytest.mark.slow
def test_a_failed_export_leaves_the_earlier_one(tiny_sd, tmp_path, monkeypatch):
    model = open_model(tiny_sd)
    folder = export_student(model, model.denoiser, tmp_path / "student", provenance={"round": 1})
    earlier = (folder / "sublimate.json").read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk is full"):
        export_student(model, model.denoiser, folder, provenance={"round": 2})
    assert (folder / "sublimate.json").read_bytes() == earlier
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_an_earlier_export_comes_back_when_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "student"
    with written_aside(folder, "marker") as aside:
        (aside / "marker").write_text("first")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError("no permission")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no permission"), written_aside(folder, "marker") as aside:
        (aside / "marker").write_text("second")
    assert (folder / "marker").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_leftovers_of_a_killed_process_of_the_same_number_do_not_matter(tmp_path):
    folder = tmp_path / "student"
    partial, earlier = (tmp_path / f".student.{os.getpid()}.{end}" for end in ("partial", "earlier"))
    for leftover in (partial, earlier):
        leftover.mkdir()
        (leftover / "marker").write_text("old")
    with pytest.raises(OSError, match="disk"), written_aside(folder, "marker"):
        raise OSError("the disk is full")
    assert (folder / "marker").read_text() == "old"
    earlier.mkdir()
    with written_aside(folder, "marker") as aside:
        (aside / "marker").write_text("new")
    assert (folder / "marker").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.slow
def test_an_export_replaces_an_earlier_one_but_nothing_else(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    folder = export_student(model, model.denoiser, tmp_path / "student", provenance={"round": 1})
    (folder / "stale").touch()
    export_student(model, model.denoiser, folder, provenance={"round": 2})
    assert not (folder / "stale").exists()
    assert json.loads((folder / "sublimate.json").read_text())["provenance"]["round"] == 2
    holiday = tmp_path / "holiday"
    holiday.mkdir()
    (holiday / "beach.jpg").touch()
    with pytest.raises(ValueError, match="something else"):
        export_student(model, model.denoiser, holiday)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["holiday", "student"]


@pytest.mark.slow
def test_the_record_says_how_it_was_made(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    folder = export_student(model, model.denoiser, tmp_path / "student", t=500, provenance={"method": "f_distill"})
    record = json.loads((folder / "sublimate.json").read_text())
    assert record["kind"] == "weights"
    assert (record["start"], record["steps"], record["guidance_scale"]) == (500.0, 1, 1.0)
    assert record["provenance"]["method"] == "f_distill"
    assert record["provenance"]["base"]["content_hash"] == model.content_hash()
    card = (folder / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "Kind: weights" in card
    assert "f_distill" in card


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("tiny_sd", "weights"), ("tiny_sd", "lora"), ("tiny_audio", "weights")])
def test_weights_are_saved_in_the_precision_asked_for(request, tmp_path, name, kind):
    model = open_model(request.getfixturevalue(name))
    student = copy.deepcopy(model.denoiser)
    if kind == "lora":
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False), student.network)
    write = export_student if kind == "weights" else export_lora
    folders = {d: write(model, student, tmp_path / str(d), dtype=d) for d in (None, torch.float16, torch.bfloat16)}
    files = [path.relative_to(folders[None]) for path in folders[None].rglob("*.safetensors")]
    assert len(files) >= {"weights": 3, "lora": 1}[kind]
    for dtype, folder in folders.items():
        for file in files:
            expected = load_file(folders[None] / file)
            for name, value in load_file(folder / file).items():
                kept = dtype is None or not expected[name].is_floating_point()  # batch norms count in integers
                assert value.dtype == (expected[name].dtype if kept else dtype)
                assert torch.equal(value, expected[name].to(value.dtype))
    if kind == "weights":
        assert open_model(folders[torch.float16]).dtype == torch.float32


def test_options_of_many_lines_are_a_block_of_the_card(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    provenance = {"config": "method: f_distill\nobjective:\n  gan_weight: 0.1\n", "seed": 3}
    card = (export_student(model, model.denoiser, tmp_path / "s", provenance=provenance) / "README.md").read_text()
    assert "\n```yaml\nmethod: f_distill\nobjective:\n  gan_weight: 0.1\n```\n" in card
    assert "| seed | `3` |" in card and "| config |" not in card


@pytest.mark.slow
def test_cards_show_how_pictures_are_given(tiny_inpainting, tiny_upscaling, tmp_path):
    expected = {tiny_inpainting: "image=image, mask_image=mask", tiny_upscaling: "image=small_image"}
    for source, arguments in expected.items():
        model = open_model(source)
        folder = export_student(model, model.denoiser, tmp_path / source.name)
        assert f'pipeline("...", {arguments}, num_inference_steps=1' in (folder / "README.md").read_text()


@pytest.mark.slow
def test_local_paths_stay_private(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    folder = export_student(model, model.denoiser, tmp_path / "student", provenance={"base": str(tiny_sd)})
    for name in ("README.md", "sublimate.json"):
        assert str(tiny_sd) not in (folder / name).read_text()
        assert tiny_sd.name in (folder / name).read_text()
    model.denoiser.network.register_to_config(_name_or_path=str(tiny_sd / "unet"))
    student = export_student(model, model.denoiser, tmp_path / "student")
    for file in student.rglob("*.json"):
        assert str(tiny_sd) not in file.read_text() and '"_name_or_path"' not in file.read_text()


def test_a_runs_record_keeps_no_path_that_leads_out_of_its_folder(tmp_path):
    trainer = {"output_dir": str(tmp_path / "secret" / "run"), "checkpointing_steps": 5}
    data = {"prompts": "../secret/words.txt", "cache_dir": "cache/here", "train_data_dir": None}
    config = DistillConfig(
        model="owner/name", method="f_distill", data=data, trainer=trainer, edits=["~/secret/e.safetensors"]
    )
    written = yaml.safe_load(dump_config(config, public=True))
    assert written["trainer"]["output_dir"] == "run" and written["edits"] == ["e.safetensors"]
    assert written["data"]["prompts"] == "words.txt" and written["data"]["cache_dir"] == "cache/here"
    assert written["model"] == "owner/name" and written["trainer"]["checkpointing_steps"] == 5
    assert yaml.safe_load(dump_config(config)) == config.model_dump(mode="json")


def test_cards_inherit_the_license_and_name_a_base_on_the_hub(tmp_path):
    options = {"title": "t", "summary": "s", "usage": "u", "provenance": {"a|b": "c|d"}}
    card = model_card(kind="lora", base="owner/name", license="mit", **options)
    (tmp_path / "README.md").write_text(card)
    assert "base_model: owner/name\nbase_model_relation: adapter" in card
    assert inherited_license(tmp_path) == "mit"
    other = model_card(kind="attachment", base="ink", **options)
    (tmp_path / "README.md").write_text(other)
    assert "base_model:" not in other and "library_name: sublimate" in other
    assert "base_model_relation: adapter" in model_card(kind="attachment", base="owner/name", **options)
    assert "license: other" in other
    assert inherited_license(tmp_path) is None
    assert inherited_license(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="weights, lora, attachment, not 'pickle'"):
        model_card(kind="pickle", base="ink", **options)
