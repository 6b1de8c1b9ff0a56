"""Classes as prompts: a class is asked for by its name, by one of its synonyms, or by its number."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.tokens import TokenSpan


def class_names(pipe: Any) -> dict[str, frozenset[int]]:
    """The classes that each name stands for, names in lower case; empty for a pipeline without names.

    A pipeline's `id2label` has one text per class, of synonyms with commas between them. Names may be shared: of
    ImageNet's two cranes one is a bird.
    """
    # Stock pipelines keep names alone, with one class each.
    kept = [(number, name) for name, number in getattr(pipe, "labels", {}).items()]
    texts = (pipe.config.get("id2label") or {}).items() or kept
    names: dict[str, frozenset[int]] = {}
    for number, text in texts:
        for name in _synonyms(text):
            names[name] = names.get(name, frozenset()) | {int(number)}
    return names


def read_classes(
    prompts: Sequence[str], names: Mapping[str, frozenset[int]], count: int, null: int | None = None
) -> list[int]:
    """The number of every prompt's class.

    Args:
        prompts: names, several synonyms of one class with commas between them, or numbers from 0 to count - 1; what is
            both is a name. Upper and lower case do not matter.
        names: what `class_names` gives.
        count: classes of the model.
        null: the number that stands for no class, which '' asks for; None where there is none.

    Raises:
        TypeError: when `prompts` is a single string.
        ValueError: for no prompts, or one that does not name exactly one class.
    """
    if isinstance(prompts, str):
        raise TypeError(f"Give a list of prompts: [{prompts!r}].")
    if not prompts:
        raise ValueError("There is no prompt to encode: give at least one class.")
    return [_read(prompt, names, count, null) for prompt in prompts]


def find_class(both: Condition, prompt: str, concept: str) -> tuple[TokenSpan, ...]:
    """`Backbone.find_concept` for classes: a prompt has no tokens, the class is all there is of it.

    Args:
        both: the prompt and the concept, encoded.
        prompt, concept: their texts.

    Raises:
        ValueError: when they are different classes.
    """
    asked, named = both["text"].tolist()
    if asked != named:
        raise ValueError(f"The prompt {prompt!r} does not mention {concept!r}: they are different classes.")
    return ()


def _read(prompt: str, names: Mapping[str, frozenset[int]], count: int, null: int | None) -> int:
    synonyms = _synonyms(prompt)
    if not synonyms and null is not None:
        return null
    known = f"names and numbers of classes, from 0 to {count - 1}" if names else f"class numbers from 0 to {count - 1}"
    if not synonyms:
        raise ValueError(f"This model has no class for no class: its prompts are {known}, not {prompt!r}.")
    if all(name in names for name in synonyms):
        found = frozenset.intersection(*(names[name] for name in synonyms))
        if len(found) == 1:
            return next(iter(found))
        several = sorted(frozenset.union(*(names[name] for name in synonyms)))
        raise ValueError(f"{prompt!r} names the classes {', '.join(map(str, several))}: give one of the numbers.")
    if prompt.strip().isdecimal() and int(prompt) < count:
        return int(prompt)
    near = difflib.get_close_matches(synonyms[0], names, n=1)
    hint = f": did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"This model's prompts are {known}, not {prompt!r}{hint}")


def _synonyms(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip().casefold())]
