"""Requests: what is refused, what reads back, and how concepts become prompts."""

import json

import pytest

from sublimate.erasure.request import Concept, Phrase, Request, fill


def test_texts_stand_for_concepts():
    assert Request(erase="seven") == Request(erase=(Concept("seven"),), preserve=())
    assert Request(erase=["seven"], preserve=["one", Concept("two")], within="red").within == Concept("red")


def test_a_request_reads_back_from_json():
    seven = Concept("seven", "one", synonyms=("7",), prompts=("the digit 7 in red",), images=("a.png",))
    request = Request(erase=(seven, Concept("neon")), preserve=(Concept("two"),), within=Concept("white"))
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    assert Request.from_dict({"erase": "seven"}) == Request(erase="seven")
    assert Request.from_dict({"erase": {"name": "seven"}, "preserve": ["one"]}) == Request("seven", ("one",))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"erase": ()}, "at least one"),
        ({"erase": "seven", "preserve": ["Seven "]}, "both erased and preserved"),
        ({"erase": Concept("seven", synonyms=["7"]), "preserve": [Concept("x", synonyms=["7"])]}, "both erased"),
        ({"erase": ["seven", "seven"]}, "twice"),
        ({"erase": "seven", "preserve": ["one", "one"]}, "twice"),
        ({"erase": "seven", "within": "seven"}, "both erased and the context"),
        ({"erase": [Concept("seven", "one"), "one"]}, "erased itself"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Request(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": " "}, "must not be empty"),
        ({"name": "seven", "synonyms": ("",)}, "must not be empty"),
        ({"name": "seven", "synonyms": ("Seven",)}, "twice"),
        ({"name": "seven", "anchor": "7", "synonyms": ("7",)}, "the concept itself"),
        ({"name": "seven", "prompts": ("a red one",)}, "none of the names"),
        ({"name": "seven", "prompts": ("the seventh",)}, "none of the names"),
    ],
)
def test_senseless_concepts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Concept(**arguments)


def test_wrong_types_and_fields_are_refused():
    with pytest.raises(TypeError, match="sequence of texts"):
        Concept("seven", synonyms="7")
    with pytest.raises(TypeError, match="got int"):
        Request(erase=[7])
    with pytest.raises(ValueError, match="Unknown field 'anchr' of a concept: it has name, anchor"):
        Request.from_dict({"erase": [{"name": "seven", "anchr": "one"}]})
    with pytest.raises(ValueError, match="Unknown field 'keep' of a request"):
        Request.from_dict({"erase": "seven", "keep": ["one"]})


def test_phrases_name_what_they_contain():
    concept = Concept("seven", "one", synonyms=("digit seven",), prompts=("A seventh Digit Seven in red",))
    assert concept.phrases(["{}", "a sevens {}!"]) == [
        Phrase("seven", "seven", "one"),
        Phrase("digit seven", "digit seven", "one"),
        Phrase("a sevens seven!", "seven", "a sevens one!"),
        Phrase("a sevens digit seven!", "digit seven", "a sevens one!"),
        Phrase("A seventh Digit Seven in red", "Digit Seven", "A seventh one in red"),
    ]
    assert Concept("seven", prompts=("a red seven",)).phrases(()) == [Phrase("a red seven", "seven", "a red")]
    twice = Concept("cat", "dog", synonyms=("kitten",), prompts=("a Cat and its kitten",))
    assert twice.phrases(()) == [Phrase("a Cat and its kitten", "kitten", "a dog and its dog")]


def test_templates_have_one_place():
    assert fill("a photo of {}", "") == "a photo of"
    assert fill("{} in red", "") == "in red"
    for template in ("seven", "{} and {}"):
        with pytest.raises(ValueError, match="exactly one"):
            fill(template, "x")


def test_a_prompt_names_a_concept_by_whole_words_of_any_of_its_names():
    concept = Concept("seven", synonyms=("digit 7",))
    assert [concept.named_in(text) for text in ("A Seven", "a digit 7!", "7", "sevens", "")] == [
        True,
        True,
        *[False] * 3,
    ]
