"""What exports leave on disk: complete folders or none, and cards that say what may be said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from sublimate.pipelines.cards import inherited_license, model_card
from sublimate.pipelines.export import export_student
from sublimate.pipelines.folders import written_aside
from sublimate.pipelines.model import open_model


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


def test_cards_show_how_pictures_are_given(tiny_inpainting, tiny_upscaling, tmp_path):
    expected = {tiny_inpainting: "image=image, mask_image=mask", tiny_upscaling: "image=small_image"}
    for source, arguments in expected.items():
        model = open_model(source)
        folder = export_student(model, model.denoiser, tmp_path / source.name)
        assert f'pipeline("...", {arguments}, num_inference_steps=1' in (folder / "README.md").read_text()


def test_local_paths_stay_private(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    folder = export_student(model, model.denoiser, tmp_path / "student", provenance={"base": str(tiny_sd)})
    for name in ("README.md", "sublimate.json"):
        assert str(tiny_sd) not in (folder / name).read_text()
        assert tiny_sd.name in (folder / name).read_text()


def test_cards_inherit_the_license_and_name_a_base_on_the_hub(tmp_path):
    options = {"title": "t", "summary": "s", "usage": "u", "provenance": {"a|b": "c|d"}}
    card = model_card(kind="lora", base="owner/name", license="mit", **options)
    (tmp_path / "README.md").write_text(card)
    assert "base_model: owner/name\nbase_model_relation: adapter" in card
    assert inherited_license(tmp_path) == "mit"
    other = model_card(kind="attachment", base="ink", **options)
    (tmp_path / "README.md").write_text(other)
    assert "base_model:" not in other
    assert "license: other" in other
    assert inherited_license(tmp_path) is None
    assert inherited_license(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="weights, lora, attachment, not 'pickle'"):
        model_card(kind="pickle", base="ink", **options)
