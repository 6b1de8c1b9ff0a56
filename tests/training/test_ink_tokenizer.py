"""Ink's tokenizer: one token per word, CLIP's layout, and the same ids after a trip through a folder."""

import json
import subprocess
import sys

import pytest
from transformers import CLIPTokenizer

from sublimate.training.ink.captions import words
from sublimate.training.ink.tokenizer import MODEL_MAX_LENGTH, build_tokenizer, save_tokenizer

PROMPTS = ["seven", "in scarlet: an outlined 7", "A Neon EIGHT, handwritten", "a zebra in red", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_word_is_one_token(tokenizer):
    ids = {word: tokenizer(word).input_ids for word in words()}
    assert all(len(tokens) == 3 for tokens in ids.values())
    assert len({tokens[1] for tokens in ids.values()}) == len(ids)


def test_start_end_and_padding_are_as_in_clip(tokenizer):
    ids = tokenizer("a red 7", padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids
    assert len(ids) == MODEL_MAX_LENGTH
    assert ids[0] == tokenizer.bos_token_id
    assert ids[4:] == [tokenizer.eos_token_id] * (MODEL_MAX_LENGTH - 4)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id != 2
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1 == tokenizer.eos_token_id


def test_any_text_can_be_spelled(tokenizer):
    for text in ("zebra", "naïve café", "数字七", "red_7!"):
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids[1:-1]


def test_case_and_spacing_do_not_matter(tokenizer):
    assert tokenizer("  A  Red\nSeven").input_ids == tokenizer("a red seven").input_ids


@pytest.mark.slow
def test_the_folder_gives_the_same_ids_in_a_fresh_process(tokenizer, tmp_path):
    save_tokenizer(tmp_path)
    code = (
        "import json, sys; from transformers import CLIPTokenizer; t = CLIPTokenizer.from_pretrained(sys.argv[1]);"
        "ids = t(json.loads(sys.argv[2]), padding='max_length', max_length=t.model_max_length).input_ids;"
        "print(json.dumps([ids, len(t), t.model_max_length, t.pad_token]))"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), json.dumps(PROMPTS)]
    ids, size, limit, pad = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    assert ids == tokenizer(PROMPTS, padding="max_length", max_length=MODEL_MAX_LENGTH).input_ids
    assert (size, limit, pad) == (len(tokenizer), MODEL_MAX_LENGTH, tokenizer.eos_token)


def test_saving_again_keeps_the_model(tokenizer, tmp_path):
    save_tokenizer(tmp_path / "a")
    CLIPTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in "ab")
    assert first["model"] == second["model"]


def test_the_ids_are_pinned(tokenizer):
    """A shipped text encoder knows these ids: changing the grammar means training the teacher again."""
    assert tokenizer("in red: a neon seven").input_ids == [669, 622, 651, 281, 320, 635, 655, 670]
