"""What judges images, as commands are told: labels, thresholds, and options that do not fit."""

import json

import pytest
import vision
from commands import failed, sublimate

from sublimate.cli.judging import detector_as_asked, read_labels


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text('{"text": "a cat", "class": "cat"}\n{"text": "a dog", "class": "dog"}\n')
    return path


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("cat\n\ndog \n")
    return path


def test_labels_are_lines(tmp_path, labels):
    assert read_labels(labels) == ["cat", "dog"]
    labels.write_text("\n")
    with pytest.raises(ValueError, match="holds no labels"):
        read_labels(labels)
    labels.write_text("cat\ndog\ncat\n")
    with pytest.raises(ValueError, match="'cat' twice"):
        read_labels(labels)


@pytest.mark.slow
def test_a_clip_is_opened_with_labels_and_a_threshold(tmp_path, labels):
    folder = str(vision.clip(tmp_path / "clip"))
    named = detector_as_asked(folder, labels, 0.3, None, group="animal", device="cpu")
    assert named.groups == {"animal": ("cat", "dog")} and named.threshold == 0.3
    assert detector_as_asked(folder, labels, None, None, device="cpu").groups == {"class": ("cat", "dog")}
    assert detector_as_asked(str(vision.vit(tmp_path / "vit")), None, 0.7, None, device="cpu").threshold == 0.7


@pytest.mark.slow
def test_a_clip_judges_what_a_model_draws(capsys, tmp_path, tiny_sd, asked, labels):
    found = tmp_path / "found.json"
    draw = ["evaluate", tiny_sd, "--steps", "1", "--prompts", asked, "--detector", vision.clip(tmp_path / "clip")]
    status, out, err = sublimate(capsys, *draw, "--labels", labels, "--threshold", "0.2", "--out", found)
    assert status == 0, err
    assert "class: " in out
    record = json.loads(found.read_text())
    assert record["agreement"]["class"]["n"] == 2
    assert record["options"]["labels"] == "labels.txt" and record["options"]["threshold"] == 0.2
    assert "say which labels" in failed(capsys, *draw)


@pytest.mark.slow
def test_options_that_the_detector_has_no_use_for_are_refused(capsys, tmp_path, tiny_sd, asked, labels):
    draw = ["evaluate", tiny_sd, "--steps", "1", "--prompts", asked]
    for option in (["--labels", labels], ["--threshold", "0.5"], ["--detector-revision", "main"]):
        assert "Ink's detector is fixed and takes no " in failed(capsys, *draw, *option)
    vit = ["--detector", vision.vit(tmp_path / "vit")]
    assert "labels of its own" in failed(capsys, *draw, *vit, "--labels", labels)
    assert "between 0 and 1" in failed(capsys, *draw, *vit, "--threshold", "1.5")
    near = ["evaluate", tiny_sd, "--reference", tmp_path, "--encoder", "x"]
    assert "leave out --reference" in failed(capsys, *near, "--threshold", "0.5")
