"""The report of an erasure study says what the study found."""

from __future__ import annotations

import torch

from sublimate.evaluation.erasure import run
from sublimate.evaluation.erasure_report import NOT_TRIED, erasure_report, example_pictures
from sublimate.evaluation.intervals import Rate
from sublimate.evaluation.report_sections import Listing, Pictures, Table, Verdict
from sublimate.evaluation.studies import ErasureStudy, PromptSet


def result(palette, **changes):
    study = ErasureStudy(
        **{
            "concept": "seven",
            "group": "digit",
            "target": PromptSet(("red seven", "seven"), ({"digit": "seven", "ink": "red"}, {"digit": "seven"})),
            "siblings": PromptSet(("one", "two", "one"), ({"digit": "one"}, {"digit": "two"}, {"digit": "one"})),
            "unrelated": PromptSet(("blue",), ({"ink": "blue"},)),
            "seeds": (3, 4),
            **changes,
        }
    )
    contents = {
        "red seven": ("seven", "red"),
        "seven": ("seven", "green"),
        "one": ("one", "red"),
        "two": ("two", "red"),
    }
    contents["blue"] = ("zero", "blue")

    def painter(edited):
        def generate(texts, seed):
            shown = [dict(zip(("digit", "ink"), contents[text], strict=True)) for text in texts]
            return palette.paint(
                [{**s, "digit": "one"} if edited and s["digit"] == "seven" else s for s in shown], seed
            )

        return generate

    return run(study, painter(False), painter(True), palette), painter(True)


def test_the_report_holds_verdict_pictures_rates_and_origin(palette):
    found, _ = result(palette)
    report = erasure_report(
        found, command="sublimate erase", lead="UCE", tried=("a soft prompt",), provenance={"base": "x"}
    )
    assert report.title == "Erasing “seven”" and report.command == "sublimate erase" and report.lead == "UCE"
    verdict, *others = report.sections
    assert isinstance(verdict, Verdict) and verdict.criteria == found.criteria and verdict.sentence == found.verdict
    assert verdict.sentence.endswith("; no attack was tried.")
    pictures = [section for section in others if isinstance(section, Pictures)]
    assert [len(section.rows) for section in pictures] == [2, 3, 1]
    rates, neighbours, instead, drift = (section for section in others if isinstance(section, Table))
    assert [row[2] for row in rates.rows] == [comparison.after for comparison in found.rates.values()]
    assert (
        rates.rows[0][1:3] == (Rate(4, 4), Rate(0, 4))
        and rates.rows[-1][0] == "other images that are none of the labels"
    )
    assert [row[0] for row in neighbours.rows] == ["one", "two"] and neighbours.rows[0][1] == Rate(4, 4)
    assert instead.rows == (("one", Rate(4, 4)),)
    assert drift.rows == (("pixels, root mean square", 0.0, None),)
    assert report.tried == (
        "2 target prompts, 2 seeds",
        "3 siblings prompts, 2 seeds",
        "1 unrelated prompts, 2 seeds",
        "a soft prompt",
    )
    assert report.not_tried == NOT_TRIED
    assert report.provenance["base"] == "x" and report.provenance["seeds"] == "3, 4"
    assert "torch" in report.provenance and report.provenance["hardware"]


def test_students_draw_the_examples_prompts_with_the_same_seed(palette):
    found, student = result(palette)
    target, siblings, _ = example_pictures(
        found, columns=("teacher", "edited"), students={"one-step student": student}
    )
    assert target.columns == ("teacher", "edited", "one-step student") and "seed 3" in target.note
    assert [row.caption for row in siblings.rows] == ["“one”", "“two”", "“one”"]
    for row, example in zip(target.rows, found.examples, strict=False):
        assert torch.equal(row.images[0], example.before) and torch.equal(row.images[1], example.after)
        assert torch.equal(row.images[2], example.after)


def test_sections_can_be_replaced_and_added(palette):
    found, _ = result(palette, siblings=PromptSet(), unrelated=PromptSet())
    extra = Listing("Attacks", ("none",))
    report = erasure_report(found, command="c", title="t", pictures=(), more=(extra,), not_tried=())
    assert report.title == "t" and report.sections[-1] == extra and report.not_tried == ()
    assert [type(section) for section in report.sections] == [Verdict, Table, Table, Listing]
    assert "<h1>t</h1>" in report.to_html()
