"""What a user asks for: concepts to erase, concepts to preserve, and the words that name them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from sublimate.pipelines.names import naming, renamed


@dataclass(frozen=True)
class Concept:
    """A concept as text (and, for methods that learn from pictures, as images).

    Attributes:
        name: how prompts call it, "van gogh".
        anchor: what takes its place when it is erased, "art"; the empty string stands for nothing in particular.
        synonyms: other names that go with it.
        prompts: whole prompts that show it, for methods that train on prompts; each contains one of its names.
        images: pictures that show it.

    Raises:
        ValueError: when a name is empty or doubled, the anchor is the concept itself, or a prompt does not name it.
    """

    name: str
    anchor: str = ""
    synonyms: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        for group in ("synonyms", "prompts"):
            if isinstance(getattr(self, group), str):
                raise TypeError(f"{group} must be a sequence of texts, got the single text {getattr(self, group)!r}.")
            object.__setattr__(self, group, tuple(getattr(self, group)))
        object.__setattr__(self, "images", tuple(Path(image) for image in self.images))
        names = [_folded(name) for name in self.names]
        if not all(names):
            raise ValueError(f"A concept's names must not be empty, got {self.names}.")
        if len(set(names)) < len(names):
            raise ValueError(f"The concept {self.name!r} has a name twice: {self.names}.")
        if _folded(self.anchor) in names:
            raise ValueError(f"The anchor of {self.name!r} is the concept itself: choose what should take its place.")
        for prompt in self.prompts:
            self._phrase(prompt)

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its synonyms."""
        return (self.name, *self.synonyms)

    def named_in(self, prompt: str) -> bool:
        """Whether a prompt has one of the names as words of their own."""
        return any(_found(name, prompt) for name in self.names)

    def phrases(self, templates: Iterable[str] = ("{}",)) -> list[Phrase]:
        """Every prompt that names the concept: names in templates, then `prompts`.

        Args:
            templates: prompts with `{}` where the name goes.

        Raises:
            ValueError: for a template without exactly one place.
        """
        filled = [
            Phrase(fill(template, name), name, fill(template, self.anchor))
            for template in templates
            for name in self.names
        ]
        return filled + [self._phrase(prompt) for prompt in self.prompts]

    def _phrase(self, prompt: str) -> Phrase:
        matches = [match for name in self.names if (match := _found(name, prompt))]
        if not matches:
            raise ValueError(f"The prompt {prompt!r} contains none of the names {self.names}.")
        match = max(matches, key=lambda m: len(m.group()))
        return Phrase(prompt, match.group(), renamed(prompt, self.names, self.anchor))


@dataclass(frozen=True)
class Phrase:
    """A prompt that names a concept.

    Attributes:
        text: the prompt.
        name: the concept's name as the prompt writes it.
        anchored: the prompt with the anchor in the name's place, wherever it stands.
    """

    text: str
    name: str
    anchored: str


@dataclass(frozen=True)
class Request:
    """What to erase from a model and what to leave alone. Plain texts stand for concepts of that name.

    Attributes:
        erase: the concepts to remove, at least one.
        preserve: concepts a method must protect, usually the nearest siblings.
        within: erase only where this concept is asked for: "glasses" within "scientist".

    Raises:
        ValueError: when nothing is to be erased, or a concept is asked for twice or in contradictory roles.
    """

    erase: tuple[Concept, ...]
    preserve: tuple[Concept, ...] = ()
    within: Concept | None = None

    def __post_init__(self) -> None:
        for group in ("erase", "preserve"):
            given = getattr(self, group)
            several = (given,) if isinstance(given, str | Concept) else given
            object.__setattr__(self, group, tuple(map(_concept, several)))
        if self.within is not None:
            object.__setattr__(self, "within", _concept(self.within))
        if not self.erase:
            raise ValueError("Nothing to erase: name at least one concept.")
        roles: dict[str, str] = {}
        within = () if self.within is None else (self.within,)
        for role, concepts in (("erased", self.erase), ("preserved", self.preserve), ("the context", within)):
            for name in (name for concept in concepts for name in concept.names):
                if (other := roles.setdefault(_folded(name), role)) != role:
                    raise ValueError(f"{name!r} is both {other} and {role}: it can only be one of them.")
            names = [_folded(name) for concept in concepts for name in concept.names]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{twice[0]!r} is {role} twice: name it once.")
        for concept in self.erase:
            if roles.get(_folded(concept.anchor)) == "erased":
                raise ValueError(f"The anchor {concept.anchor!r} of {concept.name!r} is to be erased itself.")

    def to_dict(self, *, paths: bool = True) -> dict[str, Any]:
        """The request as JSON values; without `paths` pictures are named but not located, as others may read it."""
        return {
            "erase": [_to_dict(concept, paths) for concept in self.erase],
            "preserve": [_to_dict(concept, paths) for concept in self.preserve],
            "within": None if self.within is None else _to_dict(self.within, paths),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Request:
        """Reads what `to_dict` wrote, or a hand-written mapping where texts stand for concepts, and for lists of one.

        Raises:
            ValueError: when a field is unknown or of the wrong kind, or the request contradicts itself.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"A request is a mapping with what to erase, got {values!r}.")
        _known(values, Request)
        within = values.get("within")
        return Request(
            erase=tuple(map(_read, _listed(values.get("erase", ())))),
            preserve=tuple(map(_read, _listed(values.get("preserve", ())))),
            within=None if within is None else _read(within),
        )


def fill(template: str, name: str) -> str:
    """The template with `name` in place of `{}`, without the space an empty name leaves behind.

    Raises:
        ValueError: when the template has no place for the name, or several.
    """
    if template.count("{}") != 1:
        raise ValueError(f"A template needs exactly one {{}} where the concept's name goes, got {template!r}.")
    return " ".join(template.replace("{}", name).split())


def _checked(templates: tuple[str, ...]) -> tuple[str, ...]:
    for template in templates:
        fill(template, "")
    return templates


Templates = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_checked)]
"""Prompts with one `{}` each for a concept's name."""


def _found(name: str, prompt: str) -> re.Match[str] | None:
    return naming([name]).search(prompt)


def _folded(text: str) -> str:
    return text.strip().lower()


def _concept(given: Concept | str) -> Concept:
    if not isinstance(given, str | Concept):
        raise TypeError(f"A concept is a text or a Concept, got {type(given).__name__}.")
    return Concept(given) if isinstance(given, str) else given


def _to_dict(concept: Concept, paths: bool) -> dict[str, Any]:
    values = {field.name: getattr(concept, field.name) for field in fields(concept)}
    images = [str(image) if paths else image.name for image in concept.images]
    return values | {"synonyms": list(concept.synonyms), "prompts": list(concept.prompts), "images": images}


def _read(given: Any) -> Concept:
    if isinstance(given, str):
        return Concept(given)
    if not isinstance(given, Mapping):
        raise ValueError(f"A concept is a text or a mapping with a name, got {given!r}: put texts in quotes.")
    _known(given, Concept)
    if "name" not in given:
        raise ValueError(f"A concept needs a name, got {dict(given)!r}.")
    read: dict[str, Any] = {
        key: value if key in ("name", "anchor") else tuple(_listed(value)) for key, value in given.items()
    }
    for key, value in read.items():
        for text in value if isinstance(value, tuple) else (value,):
            if not isinstance(text, str):
                raise ValueError(f"A concept's {key} must be text, got {text!r}: put it in quotes.")
    return Concept(**read)


def _listed(given: Any) -> Iterable[Any]:
    """One or several, or none."""
    if given is None:
        return ()
    return given if isinstance(given, list | tuple) else (given,)


def _known(values: Mapping[str, Any], kind: type) -> None:
    known = [field.name for field in fields(kind)]
    if unknown := sorted(values.keys() - set(known)):
        raise ValueError(f"Unknown field {unknown[0]!r} of a {kind.__name__.lower()}: it has {', '.join(known)}.")
