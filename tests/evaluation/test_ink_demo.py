"""The demo's parts: what it asks to erase, how it shares out its prompts, and that the base model draws once."""

import re

import pytest
import torch

from sublimate.evaluation.ink_demo import ink_eraser, ink_forms, ink_request, remembering, sized
from sublimate.evaluation.ink_study import ink_study
from sublimate.training.ink.vocabulary import SYNONYMS


def test_a_concept_is_erased_among_its_preserved_siblings():
    request = ink_request("7")
    (erased,) = request.erase
    assert erased.name == "seven" and "7" in erased.names
    preserved = {concept.name for concept in request.preserve}
    assert len(preserved) == 9 and "seven" not in preserved and erased.anchor in preserved
    assert {concept.name for concept in ink_request("neon").preserve} == {"solid", "outline", "striped"}


def test_several_concepts_are_erased_at_once_and_none_is_another_ones_anchor():
    request = ink_request("seven", "eight", "striped")
    assert [(c.name, c.anchor) for c in request.erase] == [("seven", "nine"), ("eight", "nine"), ("striped", "neon")]
    assert [c.name for c in request.preserve][:3] == ["zero", "one", "two"] and len(request.preserve) == 8 + 3
    with pytest.raises(ValueError, match="Nothing would be left of the styles"):
        ink_request("solid", "outline", "striped", "neon")


def test_what_is_no_digit_is_put_in_forms_of_its_own():
    forms = ink_forms("striped", 12)
    assert len(forms) == 12 and forms[0] == "{}" and all(form.count("{}") == 1 for form in forms)
    assert not any(word in form for form in forms for word in SYNONYMS["striped"])
    assert ink_eraser("uce", concepts=["seven"]).config == ink_eraser("uce").config


@pytest.mark.slow
def test_forms_name_nothing_that_is_erased_beside_and_nothing_at_all_where_an_eraser_leads_away_from_it():
    def said(forms):
        return set(re.findall(r"\w+", " ".join(forms)))

    words = {word for words in SYNONYMS.values() for word in words}
    alone = ink_eraser("esd", concepts=["red"]).config.templates
    assert len(alone) > 4 and alone == ink_forms("red", 32, unnamed=words) and not words & said(alone)
    assert words & said(ink_eraser("uce", concepts=["red"]).config.templates)
    pruned = ink_eraser("prune_then_erase", concepts=["red"])
    assert pruned.inner.config.templates == ink_eraser("uce", concepts=["red"]).config.templates
    several = ink_eraser("uce", concepts=["seven", "red", "striped"]).config.templates
    assert len(several) > 20 and not said(several) & {*SYNONYMS["seven"], *SYNONYMS["red"], *SYNONYMS["striped"]}


def test_unknown_concepts_and_erasers_are_named():
    with pytest.raises(ValueError, match="eleventy"):
        ink_request("eleventy")
    with pytest.raises(ValueError, match="no method 'nothing'"):
        ink_eraser("nothing")


@pytest.mark.parametrize("method", ["uce", "esd"])
def test_every_eraser_has_options_for_ink(method):
    assert "the digit {}" in ink_eraser(method).config.templates


@pytest.mark.parametrize("n", [8, 300])
def test_prompts_are_shared_out(n):
    study = sized(ink_study("seven", n=n), n)
    sizes = {role: len(study.prompts[role].texts) for role in study.roles}
    assert sum(sizes.values()) == n
    assert sizes["target"] >= n // 2 and min(sizes.values()) > 0


def test_the_base_model_draws_once():
    calls = []

    def draw(texts, seed):
        calls.append((tuple(texts), seed))
        return torch.full((len(texts),), float(seed))

    remembered = remembering(draw)
    first, again, other = remembered(["a"], 0), remembered(["a"], 0), remembered(["a"], 1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert calls == [(("a",), 0), (("a",), 1)]
