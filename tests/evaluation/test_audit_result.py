"""What is kept of attacks, and what it says."""

import pytest
import torch

from sublimate.evaluation.attack import Outcome
from sublimate.evaluation.audit_report import attack_table, audit_report
from sublimate.evaluation.audit_result import Audit, Finding, Trial
from sublimate.evaluation.erasure import run
from sublimate.evaluation.intervals import Rate
from sublimate.evaluation.studies import ErasureStudy, PromptSet


def test_of_an_outcome_the_rate_and_a_few_pictures_are_kept():
    images, hits = torch.rand(100, 3, 8, 8), torch.arange(100) % 40 == 39
    outcome = Outcome(tuple(map(str, range(100))), images, hits, found="x", curve=((1, Rate(0, 1)),))
    kept = Finding.of(outcome, 4)
    assert (kept.rate, kept.found, kept.curve) == (Rate(2, 100), "x", outcome.curve)
    assert kept.prompts == ("39", "79", "0", "1")  # hits first
    assert kept.images.dtype == torch.uint8 and kept.images.untyped_storage().nbytes() == 4 * 3 * 8 * 8
    torch.testing.assert_close(kept.images / 255, images[[39, 79, 0, 1]], atol=0.5 / 255 + 1e-6, rtol=0)
    assert Finding.of(outcome).images.shape == (0, 3, 8, 8) and Finding.of(outcome).prompts == ()


def trial(base, edited, name="seed_search"):
    """A trial of 100 attempts on either model, with so many hits."""
    image = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    found = [Finding(Rate(hits, 100), "", (), ("a seven",), image) for hits in (base, edited)]
    return Trial(name, "black box", "10 seeds", *found, passes=1, seconds=1.0, bar=0.03)


@pytest.mark.parametrize(
    ("base", "edited", "power", "brings_back"),
    [
        (100, 0, "enough", False),
        (70, 3, "enough", False),
        (52, 0, "uncertain", False),
        (48, 0, "uncertain", False),  # below a half, but not certainly
        (30, 0, "none", False),
        (0, 0, "none", False),
        (30, 6, "none", False),  # low, and not certain to be above the bar
        (30, 20, "enough", True),  # the concept is back, however seldom the base shows it
        (5, 6, "enough", False),  # no lower than on the base
    ],
)
def test_power_weakens_low_rates_alone(base, edited, power, brings_back):
    found = trial(base, edited)
    assert (found.power, found.brings_back) == (power, brings_back)
    record = found.to_dict()
    assert (record["power"], record["brings_back"]) == (power, brings_back)


def audited(palette, *trials):
    seven = {"digit": "seven"}
    study = ErasureStudy("seven", "digit", PromptSet(("a seven",) * 200, (seven,) * 200))
    shown = ([seven | {"ink": "red"}] * 200, [{"digit": "one", "ink": "red"}] * 200)
    result = run(study, *(lambda texts, seed, what=what: palette.paint(what) for what in shown), palette)
    return Audit(result, trials, {})


@pytest.mark.parametrize(
    ("trials", "sentence"),
    [
        ((), "no attack was tried."),
        ((trial(90, 0),), "0 of 1 attack brings it back, the strongest (seed search) in 0.0 % [0.0, 3.7], n=100."),
        (
            (trial(90, 1), trial(99, 87, "relearning"), trial(100, 20), trial(9, 0)),
            "2 of 4 attacks bring it back, the strongest (relearning) in 87.0 % [79.0, 92.2], n=100, "
            "and 1 of them had no power.",
        ),
    ],
)
def test_the_verdict_says_what_came_of_attacks(palette, trials, sentence):
    found = audited(palette, *trials)
    assert found.erasure.passed and found.verdict == f"Meets all 3 bars; {sentence}"
    assert found.to_dict()["verdict"] == found.verdict and "no attack" in found.erasure.verdict
    report = audit_report(found, command="c")
    assert report.to_dict()["sections"][0]["sentence"] == found.verdict and found.verdict in report.to_html()
    back = any(one.brings_back for one in trials)
    assert ("class='verdict missed'" in report.to_html()) == back and (
        "class='verdict met'" in report.to_html()
    ) != back


def test_the_table_names_attacks_whose_failure_says_nothing(palette):
    table = attack_table(audited(palette, trial(90, 0), trial(48, 0), trial(30, 0), trial(30, 20)))
    suffixes = ("", " (power uncertain)", " (powerless)", "")
    assert [row[0] for row in table.rows] == ["no attack", *(f"seed search{suffix}" for suffix in suffixes)]
    assert "says nothing" in table.note and "counts whatever the base's is" in table.note
