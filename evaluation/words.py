"""The words an attacker may write: those a model's tokenizer reads as one token each."""

from __future__ import annotations

from sublimate.erasure.request import Concept
from sublimate.pipelines.model import Model


def spellable(model: Model, concept: Concept) -> dict[str, int]:
    """Words of letters that are one token of the first tokenizer, with their ids; none of the concept's names.

    Raises:
        ValueError: when there is none.
    """
    tokenizer = model.pipeline.tokenizer
    names = {word.lower() for name in concept.names for word in name.split()}
    found = {}
    for token, index in sorted(tokenizer.get_vocab().items()):
        word = token.removesuffix("</w>").removeprefix("▁").lower()
        if len(word) < 2 or not (word.isascii() and word.isalpha()) or word in names:
            continue
        if tokenizer(word, add_special_tokens=False).input_ids == [index]:
            found[word] = index
    if not found:
        raise ValueError(f"{model.source} has a vocabulary without whole words, so there is nothing to search.")
    return found
