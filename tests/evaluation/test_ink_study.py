"""Studies of Ink's concepts: each role asks what it says it asks."""

from __future__ import annotations

import pytest

from sublimate.evaluation.ink_study import ink_study
from sublimate.training.ink.captions import parse
from sublimate.training.ink.vocabulary import GROUPS


@pytest.mark.parametrize("word", ["seven", "scarlet", "neon"])
def test_each_role_asks_what_it_says(word):
    study = ink_study(word, n=60)
    assert {role: len(prompts.texts) for role, prompts in study.prompts.items()} == dict.fromkeys(study.roles, 60)
    assert len(study.roles) == 4
    study.check(GROUPS)
    for role in ("target", "synonyms"):
        assert {expected[study.group] for expected in study.prompts[role].expected} == {study.concept}
    siblings = {expected[study.group] for expected in study.siblings.expected}
    assert siblings == set(GROUPS[study.group]) - {study.concept}
    assert not any(study.group in expected for expected in study.unrelated.expected)
    assert not set(study.target.texts) & set(study.synonyms.texts)


def test_expectations_are_what_the_words_say():
    study = ink_study("7", n=40, seed=5)
    assert study.concept == "seven" and study.group == "digit"
    for prompts in study.prompts.values():
        for text, expected in zip(prompts.texts, prompts.expected, strict=True):
            stated = {group: GROUPS[group][i] for group, i in parse(text)._asdict().items() if i is not None}
            assert stated == expected


def test_prompts_are_reproducible_and_depend_on_the_seed():
    study, other = ink_study("seven", n=20), ink_study("seven", n=20, seed=9)
    assert study == ink_study("seven", n=20)
    assert all(study.prompts[role] != other.prompts[role] for role in study.roles)


def test_a_word_ink_does_not_know_is_refused():
    with pytest.raises(ValueError, match="no concept 'dog'"):
        ink_study("dog")
