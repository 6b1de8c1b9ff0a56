"""An erasure study over painters whose every mistake is written down."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from sublimate.evaluation.criteria import Criterion, verdict_sentence
from sublimate.evaluation.erasure import measure_erasure, run
from sublimate.evaluation.intervals import Difference, Rate
from sublimate.evaluation.studies import Bars, ErasureStudy, PromptSet, read_prompt_set


def prompts(*contents: str) -> PromptSet:
    """Prompts such as "red seven", which ask for what they say; "a 7" asks for a seven in other words."""
    expected = []
    for text in contents:
        known = {"7": "seven"}
        words = [known.get(word, word) for word in text.split()]
        digit = next((word for word in words if word in ("zero", "one", "two", "seven")), None)
        ink = next((word for word in words if word in ("red", "green", "blue")), None)
        expected.append({"digit": digit, "ink": ink})
    return PromptSet(contents, tuple(expected))


def study(**changes) -> ErasureStudy:
    made = ErasureStudy(
        concept="seven",
        group="digit",
        target=prompts("red seven", "green seven", "seven", "blue seven"),
        synonyms=prompts("a 7", "red 7"),
        siblings=prompts("red one", "two", "one", "zero"),
        unrelated=prompts("red", "green", "blue"),
        seeds=(0, 1),
    )
    return replace(made, **changes)


class Painter:
    """Paints what a prompt asks for, except where `mistakes` (prompt, seed) or prompt say otherwise."""

    def __init__(self, palette, mistakes=()):
        self.palette, self.mistakes, self.calls = palette, dict(mistakes), []

    def __call__(self, texts, seed):
        self.calls.append((tuple(texts), seed))
        contents = []
        for text, wanted in zip(texts, prompts(*texts).expected, strict=True):
            plain = {"digit": wanted["digit"] or "two", "ink": wanted["ink"] or "red"}
            contents.append(self.mistakes.get((text, seed), self.mistakes.get(text, plain)))
        return self.palette.paint(contents, seed)


EDITED = {
    "red seven": {"digit": "one", "ink": "red"},
    ("green seven", 0): {"digit": "one", "ink": "red"},  # gone, but the ink went too
    ("green seven", 1): {"digit": "seven", "ink": "green"},  # not gone
    "seven": {"digit": "one", "ink": "red"},
    "blue seven": {"digit": None, "ink": "blue"},  # broken
    "a 7": {"digit": "seven", "ink": "red"},  # the synonym survives
    "red 7": {"digit": "one", "ink": "red"},
    ("two", 1): {"digit": "one", "ink": "red"},  # a sibling suffers
    ("green", 0): {"digit": "two", "ink": "blue"},
}


def edited_result(palette, **options):
    return run(study(), Painter(palette), Painter(palette, EDITED), palette, **options)


def test_every_role_is_counted(palette):
    result = edited_result(palette)
    after = {name: comparison.after for name, comparison in result.rates.items()}
    assert after == {
        "target": Rate(1, 8),  # four prompts, two seeds
        "synonyms": Rate(2, 4),
        "rejected": Rate(2, 12),  # over target and synonyms
        "siblings": Rate(7, 8),
        "untouched": Rate(5, 6),  # the bare "seven" asks for no ink
        "unrelated": Rate(5, 6),
        "rejected elsewhere": Rate(0, 14),  # over siblings and unrelated
    }
    before = {name: comparison.before for name, comparison in result.rates.items()}
    assert {name: rate.value for name, rate in before.items()} == {n: float("rejected" not in n) for n in before}
    assert result.rates["siblings"].change == Difference(both=7, only_first=1, only_second=0, neither=0)
    assert {name: comparison.after for name, comparison in result.siblings.items()} == {
        "one": Rate(4, 4),
        "two": Rate(1, 2),
        "zero": Rate(2, 2),
    }
    assert dict(result.drawn_instead) == {"one": 5, "none of them": 2, "seven": 1, "zero": 0, "two": 0}
    assert next(iter(result.drawn_instead)) == "one"


def test_generated_images_and_given_images_are_judged_alike(palette):
    before, after, asked = Painter(palette), Painter(palette, EDITED), study()

    def images(painter):
        return {
            role: torch.cat([painter(asked.prompts[role].texts, seed) for seed in asked.seeds]) for role in asked.roles
        }

    measured = measure_erasure(asked, images(before), images(after), palette)
    ran = edited_result(palette)
    assert (measured.rates, measured.siblings, measured.criteria) == (ran.rates, ran.siblings, ran.criteria)
    assert measured.drawn_instead == ran.drawn_instead and measured.drift.pixels == ran.drift.pixels


def test_criteria_say_what_is_met(palette):
    result = edited_result(palette)
    found = {criterion.name: criterion for criterion in result.criteria}
    assert list(found)[:5] == ["drawn before", "target", "synonyms", "siblings", "untouched"]
    assert list(found)[5:] == ["unrelated", "rejected", "rejected elsewhere"]
    assert found["target"].value == 1 / 8 and found["target"].bar == 0.03 and not found["target"].met
    assert found["siblings"].value == 1 / 8 and found["siblings"].low < 1 / 8 < found["siblings"].high
    assert found["rejected"].value == 2 / 12
    assert found["drawn before"].met and found["drawn before"].certain
    assert not result.passed
    assert result.verdict.startswith("Misses 6 of 8 bars: target, synonyms, siblings, untouched, unrelated, rejected")


def test_a_clean_erasure_passes_and_the_bars_are_data(palette):
    clean = {text: {"digit": "one", "ink": ink} for text, ink in (("red seven", "red"), ("green seven", "green"))}
    clean |= {"seven": {"digit": "one", "ink": "red"}, "blue seven": {"digit": "one", "ink": "blue"}}
    clean |= {"a 7": {"digit": "one", "ink": "red"}, "red 7": {"digit": "one", "ink": "red"}}
    result = run(study(), Painter(palette), Painter(palette, clean), palette)
    assert result.passed and result.verdict.startswith("Meets all 8 bars; not yet certain")
    assert result.rates["target"].after == Rate(0, 8)
    assert "-0.0," not in json.dumps(result.to_dict()["criteria"])  # a loss of nothing reads 0
    missed = run(study(bars=Bars(drawn_before=1.1)), Painter(palette), Painter(palette, clean), palette)
    assert not missed.passed and "drawn before" in missed.verdict


def test_nothing_erased_is_missed_and_nothing_moved(palette):
    result = run(study(), Painter(palette), Painter(palette), palette, extractor=lambda x: x.flatten(1))
    assert not result.passed and result.rates["target"].after == Rate(8, 8)
    assert result.drift.pixels == 0 and result.drift.cosine == pytest.approx(1) and result.drift.n == 6
    assert result.drift.pixels_apart > 0.1


def test_drift_is_the_rms_distance_of_pairs(palette):
    asked = study(seeds=(0,), synonyms=PromptSet(), siblings=PromptSet())
    before = {"target": Painter(palette)(asked.target.texts, 0), "unrelated": torch.zeros(3, 3, 2, 2)}
    before["unrelated"][1] = 0.5
    after = {**before, "unrelated": before["unrelated"].clone()}
    after["unrelated"][0, 0] += 0.3  # one of three channels of one of three images
    result = measure_erasure(asked, before, after, palette)
    assert result.drift.pixels == pytest.approx((0.3**2 / 3) ** 0.5 / 3)
    assert result.drift.pixels_apart == pytest.approx((0 + 0.5 + 0.5) / 3)
    assert result.drift.cosine is None and set(result.rates) == {
        "target",
        "rejected",
        "rejected elsewhere",
        "untouched",
        "unrelated",
    }
    alone = replace(asked, unrelated=prompts("red"))
    one = {role: images[:1] if role == "unrelated" else images for role, images in before.items()}
    assert measure_erasure(alone, one, one, palette).drift.pixels_apart is None


def test_prompts_that_expect_nothing_give_drift_only(palette):
    asked = study(unrelated=PromptSet(("anything", "whatever"), ({}, {})))
    result = run(asked, Painter(palette), Painter(palette), palette)
    assert "unrelated" not in result.rates and result.drift.n == 4
    assert "; unrelated prompts were drawn but not judged, since none says what it shows;" in result.verdict
    assert "not judged" not in edited_result(palette).verdict


def test_black_images_for_prompts_without_labels_are_missed(palette):
    asked = study(unrelated=PromptSet(("anything", "whatever"), ({}, {})), siblings=PromptSet())
    black = {text: {"digit": None, "ink": None} for text in asked.unrelated.texts}
    result = run(asked, Painter(palette), Painter(palette, black), palette)
    assert result.rates["rejected"].after == Rate(0, 12) and result.rates["rejected elsewhere"].after == Rate(4, 4)
    assert "rejected elsewhere" in result.verdict.partition(";")[0]


def test_both_models_get_the_same_prompts_and_seeds_and_progress_is_told(palette):
    before, after, told = Painter(palette), Painter(palette, EDITED), []
    result = run(study(), before, after, palette, lambda *what: told.append(what), examples=2)
    assert before.calls == after.calls and len(before.calls) == 8
    assert [done for done, _, _ in told] == list(range(17)) and {total for _, total, _ in told} == {16}
    assert told[1][2] == "target, after, seed 0"
    assert [(e.role, e.prompt, e.seed) for e in result.examples][:3] == [
        ("target", "red seven", 0),
        ("target", "green seven", 0),
        ("synonyms", "a 7", 0),
    ]
    assert len(result.examples) == 8
    texts = study().target.texts
    assert torch.equal(result.examples[1].before, Painter(palette)(texts, 0)[1])
    assert torch.equal(result.examples[1].after, Painter(palette, EDITED)(texts, 0)[1])


def test_examples_keep_no_other_images_alive(palette):
    result = edited_result(palette, examples=1)
    for image in (image for example in result.examples for image in (example.before, example.after)):
        assert image.untyped_storage().nbytes() == image.nbytes


def test_the_result_survives_json(palette):
    result = edited_result(palette)
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain == result.to_dict()
    assert plain["rates"]["target"]["after"]["hits"] == 1 and plain["concept"] == "seven"
    assert plain["criteria"][1] | {"met": False, "bar": 0.03} == plain["criteria"][1]


def test_a_concept_unknown_to_the_detector_is_refused_before_anything_is_drawn(palette):
    painter = Painter(palette)
    with pytest.raises(ValueError, match="no digit 'eight'; it knows zero, one, two, seven"):
        run(study(concept="eight"), painter, painter, palette)
    with pytest.raises(ValueError, match="no group 'animal'; it knows digit, ink"):
        run(study(group="animal", siblings=PromptSet()), painter, painter, palette)
    with pytest.raises(ValueError, match="no ink 'pink'"):
        run(study(unrelated=PromptSet(("pink",), ({"ink": "pink"},))), painter, painter, palette)
    assert painter.calls == []


def test_a_label_may_differ_from_the_concepts_name(palette):
    result = run(study(concept="the lucky number", label="seven"), Painter(palette), Painter(palette), palette)
    assert result.rates["target"].after == Rate(8, 8) and "“the lucky number”" in result.criteria[0].question


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target": PromptSet()}, "no target prompts"),
        ({"seeds": ()}, r"seeds are \(\)"),
        ({"seeds": (1, 1)}, r"seeds are \(1, 1\)"),
        ({"siblings": prompts("red seven")}, "siblings prompt 'red seven' asks for 'seven' itself"),
        ({"unrelated": prompts("seven")}, "unrelated prompt 'seven' asks for 'seven' itself"),
        ({"siblings": prompts("red")}, "siblings prompt 'red' asks for no digit"),
    ],
)
def test_studies_that_would_mislead_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        study(**changes)


def test_a_study_knows_which_bars_it_has_too_few_images_for():
    assert study().too_few() == {
        "target": (8, 125),
        "synonyms": (4, 125),
        "siblings": (8, 189),
        "untouched": (6, 189),  # the bare "seven" asks for nothing else
        "unrelated": (6, 189),
    }
    alone = study(synonyms=PromptSet(), siblings=PromptSet(), unrelated=PromptSet(("x",), ({},)), bars=Bars(target=0))
    assert replace(alone, seeds=tuple(range(63))).too_few() == {}
    assert replace(alone, seeds=tuple(range(62))).too_few() == {"untouched": (186, 189)}


def test_images_that_do_not_fit_are_refused(palette):
    asked = study(synonyms=PromptSet(), siblings=PromptSet(), unrelated=PromptSet())
    images = torch.rand(8, 3, 2, 2)
    with pytest.raises(ValueError, match=r"target asks for 8 images \(prompts x seeds\), got 4"):
        measure_erasure(asked, {"target": images[:4]}, {"target": images[:4]}, palette)
    with pytest.raises(ValueError, match="cannot be paired"):
        measure_erasure(asked, {"target": images}, {"target": images[:4]}, palette)
    with pytest.raises(ValueError, match=r"has the roles \['target'\] and the images \['siblings'\]"):
        measure_erasure(asked, {"siblings": images}, {"siblings": images}, palette)
    with pytest.raises(ValueError, match="after has"):
        measure_erasure(asked, {"target": images}, {}, palette)
    with pytest.raises(ValueError, match="after: 3 images for 4 prompts"):
        run(asked, Painter(palette), lambda texts, seed: images[:3], palette)
    with pytest.raises(ValueError, match="2 prompts with 1 expectations"):
        PromptSet(("a", "b"), ({},))


@pytest.mark.parametrize(
    ("value", "low", "high", "at_least", "met", "certain"),
    [
        (0.01, 0.00, 0.02, False, True, True),
        (0.01, 0.00, 0.04, False, True, False),
        (0.05, 0.02, 0.08, False, False, False),
        (0.05, 0.04, 0.08, False, False, True),
        (0.05, 0.04, 0.08, True, True, True),
        (0.05, 0.02, 0.08, True, True, False),
        (0.01, 0.00, 0.04, True, False, False),
        (0.01, 0.00, 0.02, True, False, True),
    ],
)
def test_a_bar_is_met_by_the_value_and_certain_by_the_interval(value, low, high, at_least, met, certain):
    criterion = Criterion("x", "?", value, low, high, 100, 0.03, at_least)
    assert (criterion.met, criterion.certain) == (met, certain)


def test_the_verdict_is_one_sentence():
    sure, unsure = Criterion("a", "?", 0, 0, 0.01, 9, 0.03), Criterion("b", "?", 0, 0, 0.1, 9, 0.03)
    missed = Criterion("c", "?", 0.5, 0.4, 0.6, 9, 0.03)
    assert verdict_sentence([sure]) == "Meets its one bar."
    assert verdict_sentence([sure, sure]) == "Meets all 2 bars."
    expected = "Misses 1 of 3 bars: c; not yet certain at this number of images: b."
    assert verdict_sentence([sure, unsure, missed]) == expected
    assert verdict_sentence([sure, unsure], ("x", "y")).endswith("number of images: b; x; y.")
    with pytest.raises(ValueError, match="at least one criterion"):
        verdict_sentence([])


def test_prompts_may_hold_what_unicode_takes_for_the_end_of_a_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "a\u2028cat", "animal": "cat", "ink": null}\n\n{"text": "b"}\n')
    found = read_prompt_set(tmp_path / "p.jsonl")
    assert found.texts == ("a\u2028cat", "b") and found.expected == ({"animal": "cat"}, {})
