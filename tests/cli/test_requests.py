"""`sublimate erase --request`: what to erase as a file; and `--detector`."""

import re
from pathlib import Path

import pytest
from commands import failed, sublimate
from PIL import Image

from sublimate.erasure.request import Concept, Request
from sublimate.erasure.request_files import read_request
from sublimate.pipelines.edit import Edit

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "request.yaml").write_text(text)
        return tmp_path / "request.yaml"

    return write


@pytest.mark.slow
def test_the_readmes_example(capsys, tmp_path, tiny_sd, file):
    (text,) = re.findall(r"^```yaml\n(# persons.yaml\n.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    (command,) = re.findall(r"^sublimate (erase MODEL --request .*)$", README.read_text(), re.MULTILINE)
    places = {"MODEL": tiny_sd, "persons.yaml": file(text), "edited": tmp_path / "edited"}
    status, _, err = sublimate(capsys, *(places.get(word, word) for word in command.split()))
    assert status == 0, err
    edit = Edit.load(tmp_path / "edited" / "edit.safetensors")
    erased = edit.provenance["request"]["erase"]
    assert [one["anchor"] for one in erased] == ["a woman", "a man", "a woman"] and edit.provenance["config"]
    assert len(edit.provenance["request"]["preserve"]) == 3


def test_a_file_says_all_that_a_request_can(tmp_path, file):
    (tmp_path / "cats").mkdir()
    for name in ("cats/b.png", "cats/a.png", "dog.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    found = read_request(
        file(
            "erase:\n- {name: cat, anchor: dog, synonyms: kitten, prompts: [a red cat], images: cats}\n"
            f"preserve: [red, {{name: dog, images: [dog.png, {tmp_path / 'dog.png'}]}}]\nwithin: photo\n"
        )
    )
    cats = (tmp_path / "cats" / "a.png", tmp_path / "cats" / "b.png")
    assert found == Request(
        Concept("cat", "dog", ("kitten",), ("a red cat",), cats),
        preserve=("red", Concept("dog", images=(tmp_path / "dog.png",) * 2)),
        within="photo",
    )
    assert read_request(file("erase: cat\npreserve:\n")) == Request("cat")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("erase: [{name: cat, anchr: dog}]", "Unknown field 'anchr' of a concept: it has name, anchor"),
        ("erase: cat\nkeep: dog", "Unknown field 'keep' of a request"),
        ("erase: [7]", "got 7: put texts in quotes"),
        ("erase: [{name: 7}]", "A concept's name must be text, got 7"),
        ("erase: [{name: cat, images: [7]}]", "A concept's images must be text, got 7"),
        ("erase: [{anchor: dog}]", "A concept needs a name"),
        ("- cat", "A request is a mapping"),
        ("preserve: cat", "Nothing to erase"),
        ("erase: cat\nerase: dog", "given twice"),
        ("erase: [{name: cat, images: .}]", "holds no pictures"),
    ],
)
def test_what_is_no_request_is_told_in_one_sentence(capsys, tiny_sd, tmp_path, text, said):
    (tmp_path / "asked").mkdir()
    path = tmp_path / "asked" / "request.yaml"
    path.write_text(text)
    sentence = failed(capsys, "erase", tiny_sd, "--request", path)
    assert said in sentence and str(path.parent) in sentence


@pytest.mark.slow
def test_a_file_and_options_are_not_mixed(capsys, tiny_sd, tmp_path, file):
    erase = ["erase", tiny_sd]
    path = file("erase: [{name: cat, anchor: dog}]\n")
    said = failed(capsys, *erase, "cat", "--request", path, "--anchor", "dog", "--preserve", "red")
    assert "leave out 'cat', --anchor, --preserve" in said
    assert "--images" in failed(capsys, *erase, "--request", path, "--images", tmp_path)
    assert "name at least one concept, or give a file" in failed(capsys, *erase)
    assert "nowhere.yaml" in failed(capsys, *erase, "--request", tmp_path / "nowhere.yaml")
    assert "leave out the anchor of 'cat'" in failed(capsys, *erase, "--request", path, "--method", "esd")


@pytest.mark.slow
def test_a_detector_is_for_who_consults_one(capsys, tmp_path):
    assert "uce does not consult a detector" in failed(capsys, "erase", "ink", "seven", "--detector", "ink")
    kept = ("--preserve", "one", "--preserve", "nine")
    slug = ["erase", "ink", "seven", "--method", "slug", *kept, "--detector", "ink"]
    small = ("images=1", "sampling_steps=4", "pair_steps=2", "max_probes=1", "probe_images=1", "templates=['a {}']")
    options = [word for option in small for word in ("--set", option)]
    status, _, err = sublimate(capsys, *slug, *options, "--out", tmp_path)
    assert status == 0, err
    assert Edit.load(tmp_path / "edit.safetensors").provenance["outcome"]["judge"] == "detector"
