"""The words an attacker may write: those a model's tokenizer reads as one token each."""

from __future__ import annotations

from collections.abc import Iterable

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


def unspoken(model: Model, concept: Concept, texts: Iterable[str]) -> str:
    """A word of one token that no text contains, to stand for what is learned.

    Raises:
        ValueError: when the texts use every such word.
    """
    tokenizer = model.pipeline.tokenizer
    spoken = {token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids}
    free = [word for word, index in spellable(model, concept).items() if index not in spoken]
    if not free:
        raise ValueError("The prompts use every word that the tokenizer knows, so none can stand for a new one.")
    return free[0]
