"""Prompts as tokens: limits that are kept, and which rows of a text condition hold which words."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sublimate.pipelines.names import naming

Tokenizer = Any
"""A Hugging Face tokenizer."""

log = logging.getLogger(__name__)

_cut: ContextVar[set[str] | None] = ContextVar("cut", default=None)


@dataclass(frozen=True)
class TokenSpan:
    """Where some tokens of a prompt sit in a text condition.

    Attributes:
        key: the condition's entry, "text" for a sequence.
        start, stop: rows [start, stop) of that entry's sequence.
        end: the row of the end-of-text token after the prompt; of its last token where there is none.
        last: one past the last row of this tokenizer's part, padding included where the network reads it.
    """

    key: str
    start: int
    stop: int
    end: int
    last: int

    @property
    def rows(self) -> slice:
        """The tokens themselves."""
        return slice(self.start, self.stop)

    @property
    def tail(self) -> slice:
        """The tokens and everything after them: in a causal text encoder all these rows have seen them."""
        return slice(self.start, self.last)


@contextmanager
def cut_to_fit() -> Iterator[set[str]]:
    """Within this context prompts that are too long are cut, as stock pipelines do, instead of refused.

    Whether they may be is for who gives the prompts to say, and concerns no family: each of its tokenizers cuts to its
    own limit and keeps the token that ends a text.

    Yields:
        the prompts that were cut, as they were tokenised; they become more while the context lasts.
    """
    found: set[str] = set()
    token = _cut.set(found)
    try:
        yield found
    finally:
        _cut.reset(token)


@contextmanager
def truncating(asked: bool) -> Iterator[None]:
    """`cut_to_fit`, if that is asked for, and a warning that says how many prompts were cut."""
    if not asked:
        yield
        return
    with cut_to_fit() as cut:
        yield
    if cut:
        log.warning(
            "%d of the prompts %s longer than the text encoder reads and cut to fit.",
            len(cut),
            "was" if len(cut) == 1 else "were",
        )


def tokenize(
    tokenizer: Tokenizer, prompts: Sequence[str], length: int | None = None, *, beginning: bool = False
) -> tuple[Tensor, Tensor]:
    """Token ids padded to one length; nothing is cut off, unless `cut_to_fit` or a prompt's beginning is asked for.

    Args:
        tokenizer: of the model.
        prompts: what to tokenise, at least one.
        length: tokens per prompt; the tokenizer's limit unless given.
        beginning: of a prompt that is too long, take as many tokens as fit.

    Returns:
        ids and attention mask, both int64 (prompts, length).

    Raises:
        TypeError: when `prompts` is a single string.
        ValueError: for no prompts, or a prompt that does not fit, naming it.
    """
    if isinstance(prompts, str):
        raise TypeError(f"Give a list of prompts: [{prompts!r}].")
    if not prompts:
        raise ValueError("There is no prompt to encode: give at least one, '' for the empty one.")
    limit = tokenizer.model_max_length if length is None else length
    cut = _cut.get()
    for prompt, ids in zip(prompts, tokenizer(list(prompts), verbose=False).input_ids, strict=True):
        if len(ids) <= limit or beginning:
            continue
        if cut is None:
            raise ValueError(f"The prompt {prompt!r} has {len(ids)} tokens but the model reads {limit}: shorten it.")
        cut.add(prompt)
    # Gemma's tokenizer would put the padding first.
    encoded = tokenizer(
        list(prompts),
        padding="max_length",
        padding_side="right",
        max_length=limit,
        truncation=beginning or cut is not None,
        return_tensors="pt",
    )
    return encoded.input_ids, encoded.attention_mask


def prompt_span(
    tokenizer: Tokenizer, prompt: str, length: int, *, offset: int = 0, key: str = "text", masked: bool = False
) -> TokenSpan:
    """Where a prompt's own tokens sit, without start, end and padding.

    Args:
        tokenizer: of the model.
        prompt: one prompt.
        length: rows of this tokenizer's part.
        offset: its first row within the whole sequence.
        key: the condition's entry.
        masked: padding is masked, so that this part ends with the prompt.

    Raises:
        ValueError: for a prompt that does not fit.
    """
    tokenize(tokenizer, [prompt], length)
    ids = tokenizer(prompt).input_ids
    content = tokenizer(prompt, add_special_tokens=False).input_ids
    ends = tokenizer.eos_token_id in ids
    start = _find(ids, content)[0] if content else ids.index(tokenizer.eos_token_id) if ends else len(ids)
    stop = start + len(content)
    end, last = stop if ends else len(ids) - 1, len(ids) if masked else length
    return TokenSpan(key, *(offset + row for row in (start, stop, end, last)))


def concept_span(
    tokenizer: Tokenizer,
    prompt: str,
    concept: str,
    length: int,
    *,
    offset: int = 0,
    key: str = "text",
    masked: bool = False,
) -> TokenSpan:
    """Where a concept's tokens sit in a prompt; its first mention counts.

    Whole words only: "car" is not found in "cartoon". Upper and lower case do not matter.

    Args:
        tokenizer: of the model.
        prompt: one prompt.
        concept: a word or phrase of it.
        length: rows of this tokenizer's part.
        offset: its first row within the whole sequence.
        key: the condition's entry.
        masked: padding is masked, so that this part ends with the prompt.

    Raises:
        ValueError: for an empty concept, or a prompt that does not fit or does not mention it.
    """
    span = prompt_span(tokenizer, prompt, length, offset=offset, key=key, masked=masked)
    content = tokenizer(prompt, add_special_tokens=False).input_ids
    # T5 tells upper from lower case: the prompt's own spelling counts.
    spelled = naming([concept]).search(prompt)
    name = (spelled.group() if spelled else concept).strip()
    if not name:
        raise ValueError(f"The concept {concept!r} has no tokens: name it in words.")
    tokens = tokenizer.convert_ids_to_tokens(content)
    # Gemma's tokens hold the space before a word, which the first word has not.
    for wanted in (tokenizer(text, add_special_tokens=False).input_ids for text in (name, f" {name}")):
        for first in _find(content, wanted):
            stop = first + len(wanted)
            if _starts_a_word(tokens, first) and not _splits_a_word(tokens, stop):
                return TokenSpan(key, span.start + first, span.start + stop, span.end, span.last)
    raise ValueError(f"The prompt {prompt!r} does not mention {concept!r}: its words must occur there as they are.")


def _find(sequence: Sequence[int], part: Sequence[int]) -> list[int]:
    """Every position at which `part` occurs in `sequence`."""
    last = len(sequence) - len(part)
    return [i for i in range(last + 1) if list(sequence[i : i + len(part)]) == list(part)]


def _starts_a_word(tokens: Sequence[str], start: int) -> bool:
    """Whether no word of letters or digits goes on from the token before `start`."""
    return start == 0 or not (tokens[start - 1][-1].isalnum() and tokens[start][0].isalnum())


def _splits_a_word(tokens: Sequence[str], stop: int) -> bool:
    """Whether the token at `stop` continues the word of the one before; byte-pair words end in "</w>"."""
    return stop < len(tokens) and tokens[stop][0].isalnum() and not tokens[stop - 1].endswith("</w>")
