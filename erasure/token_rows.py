"""The embedding rows in which a concept lives, and the anchor's rows that take their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sublimate.diffusion.conditions import Condition
from sublimate.erasure.request import Concept, Phrase, Request
from sublimate.pipelines.model import Model
from sublimate.pipelines.tokens import TokenSpan

Tokens = Literal["tail", "last"]
"""Which rows of a prompt are a concept's: from its first token to the end, or its last token alone."""

_BATCH = 32


@dataclass(frozen=True)
class Rows:
    """Rows of a text condition, (rows, width) each, float64 on the CPU: row i of `anchors` replaces row i of `own`."""

    own: Tensor
    anchors: Tensor


def concept_rows(
    model: Model, concepts: Sequence[Concept], templates: Sequence[str], tokens: Tokens, *, anchored: bool
) -> dict[str, Rows]:
    """The rows of concepts in all their phrases, by the condition's key.

    Only keys that reach a text layer count. One whose entry is a sequence gives token rows, once per tokenizer; an
    entry that is one vector per prompt (a pooled embedding, a class as `as_rows` has it) gives that vector.

    Args:
        model: encodes prompts.
        concepts: whose names, in templates and own prompts, are looked for.
        templates: prompts with `{}` where the name goes.
        tokens: "last" takes the concept's last token. "tail" takes every row from its first token to the end, padding
            included, since in a causal text encoder all of them have seen it.
        anchored: False leaves the rows where they are (`anchors` equals `own`).

    Raises:
        ValueError: when a prompt is too long, or its concept cannot be found among its tokens.
    """
    read = {point.key for point in model.text_entry_points()}
    phrases = [(phrase, concept.anchor) for concept in concepts for phrase in concept.phrases(templates)]
    places = [_places(model, phrase, anchor, tokens, anchored) for phrase, anchor in phrases]
    needed = max((int(max(here.max(), there.max())) + 1 for place in places for _, here, there in place), default=1)
    pairs = [(phrase.text, phrase.anchored if anchored else phrase.text) for phrase, _ in phrases]
    uses = Counter(text for pair in pairs for text in set(pair))
    repeated: dict[str, Condition] = {}
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for start in range(0, len(pairs), _BATCH):
        part = pairs[start : start + _BATCH]
        texts = {text: None for pair in part for text in pair if text not in repeated}
        encoded = _encoded(model, list(texts), needed) | repeated
        # Anchors come back with every concept that is sent to them.
        repeated = {text: condition for text, condition in encoded.items() if uses[text] > 1}
        for (text, replaced), place in zip(part, places[start : start + _BATCH], strict=True):
            own, anchors = encoded[text], encoded[replaced]
            for key in own.text_keys:
                if key in read and own[key].ndim == 2:
                    rows.setdefault(key, []).append((own[key], anchors[key]))
            for key, here, there in place:
                rows.setdefault(key, []).append((own[key][0, here], anchors[key][0, there]))
    return {key: Rows(torch.cat([o for o, _ in two]), torch.cat([a for _, a in two])) for key, two in rows.items()}


def _places(
    model: Model, phrase: Phrase, anchor: str, tokens: Tokens, anchored: bool
) -> list[tuple[str, Tensor, Tensor]]:
    """Per tokenizer: the condition's key, the concept's rows in its prompt, and the anchor's rows in its own."""
    spans = model.find_concept(phrase.text, phrase.name)
    anchor_spans = _anchor_spans(model, phrase.anchored, anchor, spans) if anchored else spans
    found, first = [], 0
    for span, anchor_span in zip(spans, anchor_spans, strict=True):
        found.append((span.key, *aligned(span, anchor_span, tokens, first)))
        first = span.last
    return found


@torch.no_grad()
def _encoded(model: Model, texts: list[str], rows: int) -> dict[str, Condition]:
    """Prompts as conditions of batch size 1, float64 on the CPU, each encoded once and no further than `rows`."""
    if not texts:
        return {}
    condition = as_rows(model, model.encode_prefixes(texts, rows))
    return {text: condition.index(i) for i, text in enumerate(texts)}


def as_rows(model: Model, condition: Condition) -> Condition:
    """What the layers that text enters through multiply, float64 on the CPU: of a class its one-hot row."""
    widths = {point.key: point.columns.stop for point in model.text_entry_points()}
    rows = condition.to("cpu", torch.float64)
    classes = {key: rows[key] for key in rows.text_keys if not rows[key].is_floating_point()}
    return rows.replace(**{key: one_hot(numbers, widths[key]).double() for key, numbers in classes.items()})


def read_rows(model: Model, condition: Condition) -> dict[str, Tensor]:
    """The rows of prompts that text layers read, (rows, width) float64 on the CPU, by the condition's key.

    Padding that the network masks is none of them.
    """
    rows = as_rows(model, condition)
    keys = {point.key for point in model.text_entry_points()} & set(rows.text_keys)
    masks = {key: rows.get(f"{key}.mask") for key in keys}
    return {key: rows[key].flatten(0, -2) if mask is None else rows[key][mask.bool()] for key, mask in masks.items()}


def request_rows(
    model: Model, request: Request, templates: Sequence[str], tokens: Tokens
) -> dict[str, tuple[Rows, Tensor]]:
    """Erased rows with their anchors, and preserved rows (k, width), k >= 0, by the condition's key."""
    erased = concept_rows(model, request.erase, templates, tokens, anchored=True)
    kept = concept_rows(model, request.preserve, templates, tokens, anchored=False)
    return {key: (rows, kept[key].own if key in kept else rows.own[:0]) for key, rows in erased.items()}


def aligned(concept: TokenSpan, anchor: TokenSpan, tokens: Tokens, first: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of a concept's rows and of the anchor's rows that replace them.

    The last tokens of both correspond, and so does what follows them: the rest of the prompt, the end token, the
    padding, each to its like. Before the last token, earlier tokens correspond counting backwards; a concept with more
    tokens than its anchor sends the extra ones to the anchor's first. An empty anchor (start = stop) is represented
    by the row before the place where the concept would stand, as in UCE's code, which for a prompt of nothing else
    is the start token.

    Args:
        concept: the concept's tokens in its prompt.
        anchor: the anchor's tokens in the prompt where it replaces the concept.
        tokens: which of the concept's rows.
        first: first row of this tokenizer's part of the sequence; nothing before it is used.

    Returns:
        two int64 tensors of the same length.
    """
    last, anchor_last = concept.stop - 1, anchor.stop - 1
    here = torch.arange(concept.start if tokens == "tail" else last, concept.last if tokens == "tail" else last + 1)
    lowest = max(min(anchor.start, anchor_last), first)
    return here, (here - last + anchor_last).clamp(lowest, anchor.last - 1)


def _anchor_spans(model: Model, prompt: str, anchor: str, concept_spans: Sequence[TokenSpan]) -> tuple[TokenSpan, ...]:
    # The words before the concept are the same in both prompts, so the anchor, or nothing, starts where it does.
    if not anchor.strip():
        return tuple(TokenSpan(s.key, s.start, s.start, s.start, s.last) for s in concept_spans)
    found = model.find_concept(prompt, anchor)
    # An earlier mention is a template's own word.
    return tuple(
        a if a.start >= s.start else TokenSpan(a.key, s.start, s.start + a.stop - a.start, a.end, a.last)
        for a, s in zip(found, concept_spans, strict=True)
    )
