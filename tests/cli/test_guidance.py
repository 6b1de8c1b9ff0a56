"""`generate` and `evaluate` on models of classes and on FLUX.1, which is told the guidance scale."""

from __future__ import annotations

import json

import pytest
import vision
from captioned_sets import image_folder
from commands import failed, sublimate
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.pipelines.pictures import to_png

pytestmark = pytest.mark.slow


def drawn(capsys, tmp_path, *arguments):
    assert sublimate(capsys, "generate", *arguments, "--steps", "2", "--out", tmp_path / "images")[0] == 0
    return (tmp_path / "images" / "00000.png").read_bytes()


def as_png(model, prompt, **options):
    return to_png(generate(open_model(model), [prompt], steps=2, **options)[0])


def test_flux_is_told_the_guidance_scale(capsys, tmp_path, tiny_flux, tiny_flux_schnell):
    strong = drawn(capsys, tmp_path, tiny_flux, "a cat", "--guidance-scale", "30")
    assert strong == as_png(tiny_flux, "a cat", guidance_scale=30.0)
    assert strong != drawn(capsys, tmp_path, tiny_flux, "a cat") == as_png(tiny_flux, "a cat", guidance_scale=3.5)
    # [schnell] is told none, and draws without guidance.
    assert drawn(capsys, tmp_path, tiny_flux_schnell, "a cat") == as_png(tiny_flux_schnell, "a cat", guidance_scale=1)
    said = failed(capsys, "generate", tiny_flux, "a cat", "--negative-prompt", "a dog")
    assert "is told the guidance scale" in said and "give negative_strength" in said
    steered = ["--negative-prompt", "a dog", "--negative-strength", "0.3", "--guidance-scale", "30"]
    assert drawn(capsys, tmp_path, tiny_flux, "a cat", *steered) != strong


def test_classes_are_drawn_by_number_and_guided_only_where_one_stands_for_none(
    capsys, tmp_path, tiny_edm_classes, tiny_dit, tiny_unconditional
):
    assert drawn(capsys, tmp_path, tiny_edm_classes, "3") == as_png(tiny_edm_classes, "3")
    assert drawn(capsys, tmp_path, tiny_dit, "cat") == as_png(tiny_dit, "0", guidance_scale=4.0)
    for model, arguments, sentence in (
        (tiny_edm_classes, ["3", "--guidance-scale", "3"], "has no text to guide by: set guidance_scale to 1"),
        (tiny_edm_classes, ["12"], "class numbers from 0 to 9, not '12'"),
        (tiny_edm_classes, [], "has no class for no class"),
        (tiny_dit, ["crane"], "'crane' names the classes 8, 9: give one of the numbers"),
        (tiny_unconditional, ["cat"], "is unconditional and cannot read 'cat'"),
    ):
        assert sentence in failed(capsys, "generate", model, *arguments)


@pytest.fixture
def classifier(tmp_path):
    """Of pictures of any size, as cats and dogs."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**size, image_size=16, patch_size=8, id2label={0: "cat", 1: "dog"})
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.mark.parametrize(("name", "words"), [("tiny_flux", ("a cat", "a dog")), ("tiny_edm_classes", ("3", "4"))])
def test_prompts_of_any_model_are_judged_by_a_classifier(capsys, request, tmp_path, classifier, name, words):
    model, asked = request.getfixturevalue(name), tmp_path / "asked.jsonl"
    lines = [{"text": word, "class": label} for word, label in zip(words, ("cat", "dog"), strict=True)]
    asked.write_text("\n".join(map(json.dumps, lines)))
    evaluate = ["evaluate", model, "--prompts", asked, "--steps", "1", "--out", tmp_path / "found.json"]
    status, _, err = sublimate(capsys, *evaluate, "--detector", classifier)
    assert status == 0, err
    assert json.loads((tmp_path / "found.json").read_text())["agreement"]["class"]["n"] == 2


def test_what_cannot_be_judged_is_refused_before_it_is_drawn(capsys, tmp_path, classifier, tiny_sd, monkeypatch):
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"text": "a cat", "class": "lion"}\n')
    monkeypatch.setattr("sublimate.pipelines.generate.generate", lambda *_, **__: pytest.fail("drawn"))
    evaluate = ["evaluate", tiny_sd, "--prompts", asked]
    assert "knows no class 'lion'; it knows cat, dog" in failed(capsys, *evaluate, "--detector", classifier)
    asked.write_text('{"text": "a cat", "digit": "seven"}\n')
    assert "reads pictures (B, 3, 32, 32), not (1, 3, 16, 16): choose another" in failed(capsys, *evaluate)


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_unconditional"])
def test_a_model_is_compared_with_pictures(capsys, request, tmp_path, name):
    model, encoder = request.getfixturevalue(name), vision.clip(tmp_path / "clip")
    pictures, out = image_folder(tmp_path / "pictures", 20), tmp_path / "found.json"
    asked = ["evaluate", model, "--steps", "1", "--guidance-scale", "1", "--n", "10", "--out", out]
    compared = [*asked, "--reference", pictures, "--encoder", encoder]
    status, said, err = sublimate(capsys, *compared)
    assert status == 0, err
    found = json.loads(out.read_text())
    assert found["fidelity"]["n"] == found["floor"]["n"] == 10 and "agreement" not in found
    assert (found["similarity"] is None) == (name == "tiny_unconditional")
    assert found["captions_cut"] == {"model": False, "encoder": False}
    assert found["options"]["reference"] == "pictures" and found["options"]["detector"] is None
    assert "floor (pictures against pictures)" in said and ("similarity to captions" in said) == (name == "tiny_sd")
    for more, sentence in (
        ([*asked, "--reference", pictures], "--reference and --encoder go together"),
        ([*compared, "--judged", "2"], "leave out --reference"),
        ([*asked, "--caption-column", "text"], "are of --reference: give that too"),
    ):
        assert sentence in failed(capsys, *more)


def test_captions_that_are_too_long_are_cut_and_that_is_said(capsys, tmp_path, tiny_sd):
    pictures = image_folder(tmp_path / "pictures", 10)
    lines = [{"file_name": f"{i}.png", "text": "cat " * 100} for i in range(10)]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    compared = ["--reference", pictures, "--encoder", vision.clip(tmp_path / "clip"), "--steps", "1"]
    status, said, err = sublimate(capsys, "evaluate", tiny_sd, *compared, "--out", tmp_path / "found.json")
    assert status == 0, err
    assert said.count("were cut") == 2
    assert json.loads((tmp_path / "found.json").read_text())["captions_cut"] == {"model": True, "encoder": True}
    (pictures / "5.png").unlink()
    assert "5.png" in failed(capsys, "evaluate", tiny_sd, *compared)
    wrong = ["evaluate", tiny_sd, *compared, "--caption-column", "said"]
    assert "has no caption column 'said', only file_name, text: set --caption-column" in failed(capsys, *wrong)
