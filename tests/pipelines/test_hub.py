"""Checkpoints of the hub: what is fetched, and that they open as they do from their folder."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import DDIMScheduler
from hub import COMMIT, Hub
from students import with_lora

from sublimate.pipelines.attachments import export_attachment
from sublimate.pipelines.export import export_lora, export_student
from sublimate.pipelines.model import open_model


@pytest.fixture
def hub(tiny_sd, tmp_path, monkeypatch):
    """A hub with a stock folder and nothing else in it."""
    return Hub({"owner/plain": shutil.copytree(tiny_sd, tmp_path / "plain")}, tmp_path / "cache", monkeypatch)


@pytest.mark.slow
def test_a_hub_id_opens_as_its_folder(hub, tiny_sd):
    (hub.published["owner/plain"] / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    model = open_model("owner/plain", revision="v1", token="secret")
    assert model.source == "owner/plain" and not model.is_student
    assert model.content_hash() == open_model(tiny_sd).content_hash()
    assert {asked for asked in hub.asked if asked[1] != COMMIT} == {("owner/plain", "v1", "secret")}
    assert {asked for asked in hub.asked if asked[1] == COMMIT} == {("owner/plain", COMMIT, "secret")}
    assert not list(hub.cache.rglob("*.bin"))


@pytest.mark.slow
def test_a_published_student_opens_as_the_student_it_is(hub, tiny_sd, tmp_path):
    teacher = open_model(tiny_sd)
    hub.published["owner/student"] = export_student(teacher, teacher.denoiser, tmp_path / "student")
    model = open_model("owner/student")
    assert model.is_student and model.guidance_scale == 1
    assert model.defaults == open_model(tmp_path / "student").defaults
    hub.online = False
    assert open_model("owner/student").defaults == model.defaults


@pytest.mark.slow
def test_the_card_of_what_is_made_of_it_names_it_and_its_license(hub, tmp_path):
    (hub.published["owner/plain"] / "README.md").write_text("---\nlicense: openrail++\n---\n# A model\n")
    model = open_model("owner/plain")
    card = (export_lora(model, with_lora(model, {}), tmp_path / "lora") / "README.md").read_text()
    assert "license: openrail++\nbase_model: owner/plain\n" in card
    assert '.from_pretrained("owner/plain")' in card
    told = {"name": "adapter", "options": {}, "usage": "", "summary": ""}
    attachment = export_attachment(model, torch.nn.Linear(1, 1), tmp_path / "attachment", **told)
    assert "license: openrail++\nbase_model: owner/plain\n" in (attachment / "README.md").read_text()


@pytest.mark.slow
def test_a_published_lora_makes_the_student_it_is(hub, tiny_sd, tmp_path):
    base = open_model(tiny_sd)
    folder = export_lora(base, with_lora(base, {}), tmp_path / "lora", t=399)
    hub.published["owner/lora"] = folder
    model, local = open_model(tiny_sd, loras=["owner/lora"]), open_model(tiny_sd, loras=[folder])
    assert model.is_student and model.defaults == local.defaults
    assert model.content_hash() == local.content_hash()
    assert isinstance(model.pipeline.scheduler, DDIMScheduler)
    assert model.pipeline.scheduler.config == local.pipeline.scheduler.config
    # One that nobody made for this library adds its weights alone.
    for name in ("sublimate.json", "README.md"):
        (folder / name).unlink()
    hub.published["owner/other"] = folder
    other = open_model(tiny_sd, loras=["owner/other"])
    assert not other.is_student and torch.equal(next(other.denoiser.parameters()), next(model.denoiser.parameters()))
