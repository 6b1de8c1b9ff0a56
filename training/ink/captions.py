"""Ink's small grammar: captions with variety, prompts for evaluation, and the inverse that reads a caption back."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping
from functools import cache
from string import Formatter
from typing import NamedTuple

from sublimate.training.ink.vocabulary import GROUPS, SYNONYMS, Glyph, all_glyphs, is_concept, locate

TEMPLATES = (
    "a {ink} {style} {digit}",
    "a {style} {ink} {digit}",
    "{ink} {style} {digit}",
    "{style} {ink} {digit}",
    "a {style} {digit} in {ink}",
    "a {ink} {digit} in {style}",
    "a {digit} in {ink} {style}",
    "the digit {digit} in {style} {ink}",
    "the number {digit} in {ink} ink, {style}",
    "{digit} in {ink}, {style} style",
    "{digit}, {ink} and {style}",
    "{digit}, {style} and {ink}",
    "in {ink}: a {style} {digit}",
    "in {style}: a {ink} {digit}",
    "a {ink} {digit}",
    "{ink} {digit}",
    "a {digit} in {ink}",
    "{digit} in {ink} ink",
    "the digit {digit} in {ink}",
    "the {ink} number {digit}",
    "{digit}, {ink}",
    "in {ink}: a {digit}",
    "a {style} {digit}",
    "{style} {digit}",
    "a {digit} in {style}",
    "{digit} in {style} style",
    "the digit {digit} in {style}",
    "the {style} number {digit}",
    "{digit}, {style}",
    "in {style}: a {digit}",
    "a {ink} {style} digit",
    "a {style} {ink} number",
    "{ink} {style}",
    "{style} {ink}",
    "a {style} digit in {ink}",
    "a {ink} digit in {style} style",
    "in {ink}: a {style} number",
    "{digit}",
    "a {digit}",
    "the digit {digit}",
    "the number {digit}",
    "number {digit}",
    "{ink}",
    "a {ink} digit",
    "a digit in {ink}",
    "a number in {ink} ink",
    "{style}",
    "a {style} digit",
    "a digit in {style}",
    "a number in {style} style",
    "a digit",
    "a number",
)
"""The forms of training captions; braces are what the caption states."""

FRAMES = (
    "a drawing of {}",
    "a picture of {}",
    "an image of {}",
    "a photo of {}",
    "a painting of {}",
    "handwriting: {}",
    "{}, handwritten",
    "{} on black",
)
"""What a training caption that starts with an article may be set in."""

PARAPHRASES = (
    "a drawing in {ink} and {style}: the number {digit}",
    "a {ink} picture of {digit} in {style} style",
    "{style} handwriting, {ink} ink, the digit {digit}",
    "the {style} digit in {ink} on black, a {digit}",
    "an image of the {ink} and {style} {digit}",
    "a {ink} drawing of the number {digit}",
    "handwritten in {ink} ink: {digit}",
    "the digit in {ink}, a {digit}",
    "a {style} picture of the digit {digit}",
    "handwritten in {style} style: {digit}",
    "the number in {style}, a {digit}",
    "a {style} drawing in {ink}",
    "{ink} handwriting in {style} style",
    "a handwritten number, the digit {digit}",
    "the picture of a handwritten {digit}",
    "a drawing, {digit}",
    "{ink} handwriting on black",
    "a drawing in {ink} ink",
    "{style} handwriting on black",
    "a drawing in {style} style",
)
"""Forms that no training caption has, made of words that training captions do have."""

_BARE = 0.10  # share of captions that are one concept's name and nothing else
_FRAMED = 0.3
_NAME = 0.5  # a concept goes by its own name this often, otherwise by any of its words
_STATED: Mapping[str, float] = {"digit": 0.85, "ink": 0.55, "style": 0.55}
_BARE_GROUPS = ("digit", "digit", "ink", "style")  # digits are half of all bare names


class Mentions(NamedTuple):
    """What a caption states: indices into `DIGITS`, `INKS` and `STYLES`, None where it says nothing."""

    digit: int | None = None
    ink: int | None = None
    style: int | None = None


class Caption(NamedTuple):
    """A caption and what it states."""

    text: str
    mentions: Mentions


def fields(template: str) -> frozenset[str]:
    """The groups a template states."""
    return frozenset(name for _, name, _, _ in Formatter().parse(template) if name)


def caption(glyph: Glyph, rng: random.Random) -> Caption:
    """A training caption for a glyph: what it states, in which words and in which form are all drawn from `rng`."""
    if rng.random() < _BARE:
        group = rng.choice(_BARE_GROUPS)
        return _fill(f"{{{group}}}", glyph, rng)
    stated = frozenset(group for group, share in _STATED.items() if rng.random() < share)
    return _trained_form(stated, glyph, rng)


def paraphrase(glyph: Glyph, rng: random.Random, stated: Collection[str] = ("digit",)) -> Caption:
    """A caption in a form that training never shows, stating exactly the groups in `stated` (at least one)."""
    return _fill(rng.choice(_by_fields(PARAPHRASES, frozenset(stated))), glyph, rng)


def prompts(
    n: int,
    seed: int,
    *,
    digit: str | None = None,
    ink: str | None = None,
    style: str | None = None,
    naming: Collection[str] = (),
    exclude: Collection[str] = (),
    paraphrased: bool = False,
) -> list[Caption]:
    """Prompts for evaluation, with their ground truth; the same ones for the same arguments.

    Args:
        n: how many.
        seed: what they are drawn from.
        digit: state this digit ("seven") in every prompt.
        ink: state this ink in every prompt.
        style: state this style in every prompt.
        naming: groups ("digit", "ink", "style") that every prompt must state, whatever their value.
        exclude: concepts that no prompt states.
        paraphrased: take only forms that training never showed (`PARAPHRASES`).

    Returns:
        Captions that state at least one group each.

    Raises:
        ValueError: for a concept or a group Ink does not have, or when a concept is both asked for and excluded.
    """
    asked = {group: name for group, name in (("digit", digit), ("ink", ink), ("style", style)) if name is not None}
    wanted = {group: _index_in(group, name) for group, name in asked.items()}
    banned = {locate(name) for name in exclude}
    for group in naming:
        if group not in GROUPS:
            raise ValueError(f"Ink has the groups {', '.join(GROUPS)}, not {group!r}.")
    allowed = [
        glyph
        for glyph in all_glyphs()
        if all(getattr(glyph, group) == index for group, index in wanted.items())
        and not any(getattr(glyph, group) == index for group, index in banned)
    ]
    if not allowed:
        raise ValueError(f"No prompt can state {asked} while excluding {sorted(exclude)}; exclude fewer concepts.")
    always = {*naming, *wanted}
    rng = random.Random(f"prompts/{seed}")
    drawn: list[Caption] = []
    while len(drawn) < n:
        glyph = rng.choice(allowed)
        stated = frozenset(group for group, share in _STATED.items() if group in always or rng.random() < share)
        if stated:
            drawn.append(paraphrase(glyph, rng, stated) if paraphrased else _trained_form(stated, glyph, rng))
    return drawn


def parse(text: str) -> Mentions:
    """Reads what a text states: `parse("in scarlet: a neon 7")` is `Mentions(digit=7, ink=0, style=3)`.

    Words that Ink does not know are passed over.

    Raises:
        ValueError: when the text states two different concepts of one group.
    """
    found: dict[str, int] = {}
    for word in re.findall(r"[a-z]+|[0-9]", text.lower()):
        if not is_concept(word):
            continue
        group, index = locate(word)
        if found.setdefault(group, index) != index:
            names = GROUPS[group]
            raise ValueError(f"{text!r} states two {group}s, {names[found[group]]} and {names[index]}; state one.")
    return Mentions(**found)


def words() -> tuple[str, ...]:
    """Every word and punctuation mark of the grammar, sorted: what the tokenizer must hold as single tokens."""
    forms = " ".join((*TEMPLATES, *FRAMES, *PARAPHRASES))
    plain = re.findall(r"[a-z]+|[,:]", re.sub(r"{[a-z]*}", " ", forms))
    names = [word for known in SYNONYMS.values() for word in known]
    return tuple(sorted({*plain, "an", *names}))


def _index_in(group: str, name: str) -> int:
    actual, index = locate(name)
    if actual != group:
        raise ValueError(f"{name!r} is one of Ink's {actual}s, not one of its {group}s ({', '.join(GROUPS[group])}).")
    return index


@cache
def _by_fields(templates: tuple[str, ...], stated: frozenset[str]) -> tuple[str, ...]:
    chosen = tuple(template for template in templates if fields(template) == stated)
    if not chosen:
        raise ValueError(f"No template states exactly {sorted(stated)}; known groups are {', '.join(GROUPS)}.")
    return chosen


def _trained_form(stated: frozenset[str], glyph: Glyph, rng: random.Random) -> Caption:
    template = rng.choice(_by_fields(TEMPLATES, stated))
    if template.startswith(("a ", "the ")) and rng.random() < _FRAMED:
        template = rng.choice(FRAMES).replace("{}", template)
    return _fill(template, glyph, rng)


def _fill(template: str, glyph: Glyph, rng: random.Random) -> Caption:
    stated = {group: getattr(glyph, group) for group in GROUPS if group in fields(template)}
    chosen = {group: _word(GROUPS[group][index], rng) for group, index in stated.items()}
    return Caption(_with_articles(template.format(**chosen)), Mentions(**stated))


def _word(concept: str, rng: random.Random) -> str:
    return concept if rng.random() < _NAME else rng.choice(SYNONYMS[concept])


def _with_articles(text: str) -> str:
    """Turns "a" into "an" where the next word starts with a vowel sound ("one" does not)."""
    return re.sub(r"\ba (?=(?!one\b)[aeiou]|8)", "an ", text)
