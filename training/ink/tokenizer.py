"""Ink's tokenizer: a `CLIPTokenizer` with a vocabulary of its own, in which every word of the grammar is one token."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from sublimate.training.ink.captions import words

MODEL_MAX_LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"
_SUFFIX = "</w>"


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer, the same one on every machine.

    Laid out as CLIP's own: the 256 byte characters, the same at the end of a word, the merges, then the start and end
    tokens; padding is the end token. Words that Ink does not have fall back to pieces and single characters.

    Raises:
        RuntimeError: when a word of the grammar did not become a single token.
    """
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: Any = _learned_merges()  # annotated as lists of strings by transformers, which means pairs
    endings = [character + _SUFFIX for character in characters]
    tokens = dict.fromkeys([*characters, *endings, *("".join(pair) for pair in merges), START, END])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MODEL_MAX_LENGTH)
    split = [word for word in words() if len(tokenizer.tokenize(word)) != 1]
    if split:
        raise RuntimeError(f"Words of the grammar fell into pieces: {', '.join(split)}.")
    return tokenizer


def save_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """Builds the tokenizer and writes it where `CLIPTokenizer.from_pretrained(folder)` finds it."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    return tokenizer


def _learned_merges() -> list[tuple[str, str]]:
    """Byte-pair merges that join every word of the grammar into one token.

    The most frequent pair goes first and ties go by the alphabet. (The trainer in `tokenizers` breaks ties differently
    from run to run, which would give each machine other ids.)
    """
    pieces = [[*word[:-1], word[-1] + _SUFFIX] for word in words()]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for word in pieces for pair in pairwise(word))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merged(word, best) for word in pieces]


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
