"""`sublimate audit`: a report of what brings a concept back, and one clear sentence for bad input."""

import json

import pytest
import torch

from sublimate.cli.app import run
from sublimate.cli.audit import N
from sublimate.erasure.methods.uce import UCE
from sublimate.evaluation import audit as module
from sublimate.evaluation.attacks.encoder_swap import EncoderSwap
from sublimate.evaluation.attacks.paraphrases import Paraphrases
from sublimate.evaluation.ink_demo import ink_request
from sublimate.evaluation.ink_study import ink_study
from sublimate.pipelines.edit import open_edited
from sublimate.pipelines.model import open_model


def audited(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(["audit", *map(str, arguments)])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture(scope="module")
def edit(tmp_path_factory):
    return UCE().fit(open_model("ink"), ink_request("seven")).save(tmp_path_factory.mktemp("edit") / "e.safetensors")


@pytest.mark.parametrize("concept", ["zero", "red", "striped"])
def test_as_many_prompts_as_are_asked_by_default_can_meet_every_bar(concept):
    assert ink_study(concept, n=N).too_few() == {}


@pytest.mark.slow
def test_it_writes_a_report(capsys, tmp_path, edit):
    options = ["--n", 3, "--pictures", 4, "--attack", "paraphrases", "--attack", "completion", "--out", tmp_path]
    status, out, err = audited(capsys, "ink", edit, "--concept", "7", *options, "--set", "completion.sampling_steps=4")
    assert status == 0, err
    assert "no attack: base 100.0 %" in out and "completion" in out
    assert "target: 3 images cannot be certain to meet their bar; it takes 125 or more." in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert "of 2 attacks bring it back, the strongest (" in report["sections"][0]["sentence"]
    assert report["sections"][0]["sentence"] in out
    assert report["title"] == "Audit: erasing “seven”"
    assert any(line.startswith("completion: one completion per picture") for line in report["tried"])
    assert "relearning: not asked for" in report["not_tried"]
    assert "safe" not in (tmp_path / "report.html").read_text().lower().replace("safetensors", "")


@pytest.mark.slow
def test_an_edit_is_audited_in_the_precision_that_was_asked_for(capsys, tmp_path, edit, monkeypatch):
    seen = []

    def looked(base, edited, *arguments, **options):
        seen.extend([base, edited])
        raise ValueError("enough seen")

    monkeypatch.setattr(module, "audit", looked)
    status, _, err = audited(capsys, "ink", edit, "--concept", "seven", "--dtype", "bfloat16", "--out", tmp_path)
    assert status == 1 and "enough seen" in err
    base, edited = seen
    assert base.dtype == edited.dtype == torch.bfloat16
    assert base.content_hash() == open_model("ink", dtype=torch.bfloat16).content_hash()
    assert edited.content_hash() == open_edited("ink", [edit], dtype=torch.bfloat16).content_hash()


@pytest.mark.slow
def test_what_is_finished_outlives_a_stop(capsys, tmp_path, edit, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    options = ["--n", 3, "--pictures", 4, "--attack", "paraphrases", "--attack", "encoder_swap", "--out", tmp_path]
    with monkeypatch.context() as patched:
        patched.setattr(EncoderSwap, "out_of_place", stop)
        status, _, err = audited(capsys, "ink", edit, "--concept", "seven", *options)
    assert status == 130 and f"{tmp_path / 'parts'}: the same command goes on after it." in err
    assert not (tmp_path / "report.json").exists()
    monkeypatch.setattr(Paraphrases, "run", stop)
    status, out, _ = audited(capsys, "ink", edit, "--concept", "seven", *options)
    assert status == 0 and "paraphrases" in out and ": base" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--concept", "seven", "--attack", "relearnin"], "did you mean 'relearning'"),
        (["--concept", "seven", "--attack", "relearning", "--set", "relearning.step=3"], "did you mean"),
        (["--concept", "eleven"], "eleven"),
        (["--concept", "seven", "--prompts", "nowhere"], "--group"),
        (["--concept", "seven", "--prompts", "nowhere", "--group", "digit"], "no prompt file"),
        (["--concept", "seven", "--label", "7"], "--label"),
        (["--concept", "seven", "--attack", "paraphrases"], "no edit file"),
        (["--concept", "seven", "--threshold", "0.5"], "takes no threshold"),
        (["--concept", "seven", "--edited-variant", "fp16"], "no variant of its own"),
    ],
)
def test_bad_input_is_one_sentence(capsys, tmp_path, options, complaint):
    status, _, err = audited(capsys, "ink", tmp_path / "no.safetensors", *options)
    assert status == 1
    (said,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert complaint in said
