"""How LoRAs are named: paths and hub ids, one of several files, and a scale."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from sublimate.pipelines import lora_sources
from sublimate.pipelines.lora_files import fuse_lora
from sublimate.pipelines.lora_sources import LORA_FILE, LoraSource, public_lora


@pytest.mark.parametrize(
    ("name", "place", "file", "scale"),
    [
        ("me/style", "me/style", None, 1.0),
        ("me/style@0.7", "me/style", None, 0.7),
        ("me/style@-1", "me/style", None, -1.0),
        ("me/style:a/b.safetensors", "me/style", "a/b.safetensors", 1.0),
        ("me/style:b.safetensors@1e-1", "me/style", "b.safetensors", 0.1),
        ("no@where/lora.safetensors", "no@where/lora.safetensors", None, 1.0),
        ("no@where.safetensors", "no@where.safetensors", None, 1.0),
        ("no/such/folder:b.safetensors", "no/such/folder:b.safetensors", None, 1.0),
    ],
)
def test_names(name, place, file, scale):
    assert LoraSource.read(name) == LoraSource(place, file, scale)


def test_what_exists_is_what_it_is_called(tmp_path):
    for name in ("a@0.7", "b:c", "d@x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.safetensors").touch()
        assert LoraSource.read(tmp_path / name) == LoraSource(str(tmp_path / name))
        assert LoraSource.read(f"{tmp_path / name}@2") == LoraSource(str(tmp_path / name), None, 2.0)
        inside = LoraSource.read(f"{tmp_path / name}:one.safetensors@2")
        assert inside == LoraSource(str(tmp_path / name), "one.safetensors", 2.0)
        assert inside.found(None) == (str(tmp_path / name / "one.safetensors"), None)


@pytest.mark.parametrize("scale", ["strong", "", "nan", "inf"])
def test_a_scale_that_is_no_number(scale):
    with pytest.raises(ValueError, match=rf"The scale of the LoRA me/style is '{scale}': give a number"):
        LoraSource.read(f"me/style@{scale}")


def test_one_of_several_files_of_a_folder(tmp_path):
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "optimizer.safetensors").touch()
    assert LoraSource.read(tmp_path).found(None) == (str(tmp_path / "a.safetensors"), None)
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds a\.safetensors, b\.safetensors: say which, as .*:a\.safetensors\."):
        LoraSource.read(tmp_path).found(None)
    (tmp_path / LORA_FILE).touch()
    assert LoraSource.read(tmp_path).found(None) == (str(tmp_path / LORA_FILE), None)


def test_one_of_several_files_of_a_hub_repository(monkeypatch):
    held = ["README.md", "a.safetensors", "sub/b.safetensors"]
    monkeypatch.setattr(lora_sources, "list_repo_files", lambda name, token: held)
    with pytest.raises(ValueError, match=r"me/style holds a\.safetensors, sub/b\.safetensors: say which"):
        LoraSource.read("me/style").found(None)
    assert LoraSource.read("me/style:sub/b.safetensors@0.5").found(None) == ("me/style", "sub/b.safetensors")
    held.pop()
    assert LoraSource.read("me/style").found(None) == ("me/style", "a.safetensors")


def test_a_hub_that_does_not_answer_may_have_answered_before(monkeypatch):
    def silent(name, token):
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(lora_sources, "list_repo_files", silent)
    assert LoraSource.read("me/style").found(None) == ("me/style", LORA_FILE)


@pytest.mark.parametrize("name", ["missing.safetensors", "missing", "pickle.ckpt", "{}:missing.safetensors", "{}"])
def test_what_is_not_there(tmp_path, name):
    given = name.format(tmp_path) if "{" in name else str(tmp_path / name)
    with pytest.raises(ValueError, match=r"there is no such file|is a pickle"):
        LoraSource.read(given).found(None)


def test_paths_are_nobodys_business(tmp_path):
    (tmp_path / "lora").mkdir()
    assert public_lora(f"{tmp_path / 'lora'}:a.safetensors@0.7") == "lora:a.safetensors@0.7"
    assert public_lora("me/style@0.7") == "me/style@0.7"


class Pipeline:
    """Keeps what it is asked to load."""

    def __init__(self):
        self.components = {}

    def load_lora_weights(self, place, *, weight_name, token, **options):
        self.asked = (place, weight_name, token)
        raise ValueError("no more")


def test_a_file_of_the_hub_is_fetched_by_its_name():
    pipeline = Pipeline()
    with pytest.raises(ValueError, match=r"me/style:b\.safetensors@0\.5 cannot be opened as a LoRA"):
        fuse_lora(pipeline, "me/style:b.safetensors@0.5", token="mine")
    assert pipeline.asked == ("me/style", "b.safetensors", "mine")
