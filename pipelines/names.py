"""Names of concepts in prompts: words of their own, whatever their case."""

from __future__ import annotations

import re
from collections.abc import Iterable


def naming(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of the names, the longest that fits."""
    longest = sorted((name.strip() for name in names), key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)", re.IGNORECASE)


def renamed(prompt: str, names: Iterable[str], words: str) -> str:
    """The prompt with other words in the place of every name; without the space that no words leave behind."""
    found = naming(names).sub(lambda match: words, prompt)
    return found if words else " ".join(found.split())
