"""Ink's grammar: captions say what they claim, with the variety that makes bare names and paraphrases fair tests."""

import random
import re
from collections import Counter

import pytest

from sublimate.training.ink.captions import (
    PARAPHRASES,
    TEMPLATES,
    Mentions,
    caption,
    fields,
    paraphrase,
    parse,
    prompts,
    words,
)
from sublimate.training.ink.vocabulary import GROUPS, SYNONYMS, Glyph, all_concepts, all_glyphs, is_concept, locate


@pytest.fixture(scope="module")
def corpus():
    rng = random.Random(0)
    return [(glyph, caption(glyph, rng)) for glyph in rng.choices(all_glyphs(), k=6000)]


def test_a_word_names_one_concept():
    known = [word for label in all_concepts() for word in SYNONYMS[label]]
    assert len(known) == len(set(known))
    assert all(SYNONYMS[label][0] == label for label in all_concepts())
    assert locate("Scarlet") == ("ink", 0)
    assert locate("7") == ("digit", 7)


def test_an_unknown_concept_is_refused():
    with pytest.raises(ValueError, match="no concept 'mauve'"):
        locate("mauve")


def test_captions_parse_back_to_what_they_state(corpus):
    for glyph, (text, mentions) in corpus:
        assert parse(text) == mentions
        assert all(stated in (None, shown) for stated, shown in zip(mentions, glyph, strict=True))


def test_attributes_are_dropped_at_the_documented_rates(corpus):
    share = {group: sum(getattr(c.mentions, group) is not None for _, c in corpus) / len(corpus) for group in GROUPS}
    assert share["digit"] == pytest.approx(0.9 * 0.85 + 0.05, abs=0.025)
    assert share["ink"] == pytest.approx(0.9 * 0.55 + 0.025, abs=0.025)
    assert share["style"] == pytest.approx(0.9 * 0.55 + 0.025, abs=0.025)


def test_bare_names_are_in_distribution(corpus):
    bare = Counter(locate(c.text)[0] for _, c in corpus if is_concept(c.text))
    assert sum(bare.values()) / len(corpus) > 0.10
    assert min(bare[group] for group in GROUPS) / len(corpus) > 0.02


def test_every_word_of_every_concept_occurs(corpus):
    seen = {word for _, c in corpus for word in re.findall(r"[a-z]+|[0-9]|[,:]", c.text)}
    assert seen == set(words())


def test_articles_agree(corpus):
    for _, c in corpus:
        assert not re.search(r"\ba (eight|8|outline|azure|emerald|ivory)", c.text)
        assert not re.search(r"\ban (?!eight|8|outline|azure|emerald|ivory|image)", c.text)


def test_the_same_seed_gives_the_same_captions():
    glyph = Glyph(7, 0, 3)
    first = [caption(glyph, random.Random(5)) for _ in range(1)]
    rng = random.Random(5)
    assert caption(glyph, rng) == first[0]
    assert len({caption(glyph, rng).text for _ in range(200)}) > 80


def test_paraphrases_are_new_forms_of_known_words(corpus):
    assert not set(PARAPHRASES) & set(TEMPLATES)
    trained = {c.text for _, c in corpus}
    rng = random.Random(1)
    stated_by_some = {fields(template) for template in PARAPHRASES}
    for stated in stated_by_some:
        for glyph in rng.choices(all_glyphs(), k=60):
            text, mentions = paraphrase(glyph, rng, stated)
            assert text not in trained
            assert parse(text) == mentions
            assert {group for group in GROUPS if getattr(mentions, group) is not None} == stated
            assert set(re.findall(r"[a-z]+|[0-9]|[,:]", text)) <= set(words())
    assert len(stated_by_some) == 7


@pytest.mark.parametrize("paraphrased", [False, True])
def test_prompts_carry_their_ground_truth(paraphrased):
    drawn = prompts(100, 3, digit="seven", exclude=("red", "neon"), paraphrased=paraphrased)
    assert len(drawn) == 100
    assert all(parse(text) == mentions for text, mentions in drawn)
    assert all(mentions.digit == 7 and mentions.ink != 0 and mentions.style != 3 for _, mentions in drawn)
    assert drawn == prompts(100, 3, digit="seven", exclude=("red", "neon"), paraphrased=paraphrased)
    assert drawn != prompts(100, 4, digit="seven", exclude=("red", "neon"), paraphrased=paraphrased)


def test_siblings_of_an_erased_concept():
    drawn = prompts(200, 0, naming=("digit",), exclude=("seven",))
    assert {mentions.digit for _, mentions in drawn} == set(range(10)) - {7}


def test_prompts_accept_synonyms_and_refuse_the_wrong_group():
    assert all(mentions.ink == 0 for _, mentions in prompts(10, 0, ink="crimson"))
    with pytest.raises(ValueError, match="'red' is one of Ink's inks"):
        prompts(1, 0, digit="red")
    with pytest.raises(ValueError, match="excluding"):
        prompts(1, 0, digit="seven", exclude=("7",))
    with pytest.raises(ValueError, match="not 'colour'"):
        prompts(1, 0, naming=("colour",))


def test_parse_passes_over_foreign_words_and_refuses_contradictions():
    assert parse("a glowing 3 by Rembrandt") == Mentions(digit=3, style=3)
    assert parse("an oil painting") == Mentions()
    with pytest.raises(ValueError, match="two digits, three and seven"):
        parse("a three beside a 7")
