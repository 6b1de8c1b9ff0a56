"""The concepts of Ink: digits, inks and styles, the words that name them, and the glyph that combines one of each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = ("red", "green", "blue", "yellow", "white", "purple")
STYLES = ("solid", "outline", "striped", "neon")

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType({"digit": DIGITS, "ink": INKS, "style": STYLES})
"""The three kinds of concept, each an exclusive group of labels."""

SYNONYMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **{name: (name, str(value)) for value, name in enumerate(DIGITS)},
        "red": ("red", "scarlet", "crimson"),
        "green": ("green", "emerald"),
        "blue": ("blue", "azure"),
        "yellow": ("yellow", "golden"),
        "white": ("white", "ivory"),
        "purple": ("purple", "violet"),
        "solid": ("solid", "filled"),
        "outline": ("outline", "outlined", "hollow"),
        "striped": ("striped", "hatched"),
        "neon": ("neon", "glowing"),
    }
)
"""Every word that names a concept, the concept's own name first. No word names two concepts."""


class Glyph(NamedTuple):
    """What one picture shows: indices into `DIGITS`, `INKS` and `STYLES`."""

    digit: int
    ink: int
    style: int


_PLACES = {
    word: (group, index)
    for group, labels in GROUPS.items()
    for index, label in enumerate(labels)
    for word in SYNONYMS[label]
}


def is_concept(word: str) -> bool:
    """Whether `word` is the name, or a synonym, of a concept of Ink."""
    return word.lower() in _PLACES


def locate(word: str) -> tuple[str, int]:
    """The group a concept belongs to and its index there: `locate("scarlet")` is `("ink", 0)`.

    Raises:
        ValueError: when the word names no concept of Ink.
    """
    place = _PLACES.get(word.lower())
    if place is None:
        raise ValueError(f"Ink has no concept {word!r}; it has {', '.join(all_concepts())}.")
    return place


def all_concepts() -> tuple[str, ...]:
    """The names of all concepts: ten digits, six inks, four styles."""
    return tuple(label for labels in GROUPS.values() for label in labels)


@cache
def all_glyphs() -> tuple[Glyph, ...]:
    """All 240 combinations of digit, ink and style."""
    return tuple(
        Glyph(digit, ink, style)
        for digit in range(len(DIGITS))
        for ink in range(len(INKS))
        for style in range(len(STYLES))
    )
