"""Captions as PixArt and Sana read them: in lower case, padding masked, and projected before any attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.backbones.base import EntryPoint
from sublimate.pipelines.tokens import TokenSpan, concept_span, prompt_span, tokenize


def plain_captions(prompts: Sequence[str]) -> list[str]:
    """Prompts as the stock pipelines read them where they clean nothing: in lower case, trimmed.

    Raises:
        TypeError: when `prompts` is a single string.
    """
    if isinstance(prompts, str):
        raise TypeError(f"Give a list of prompts: [{prompts!r}].")
    return [prompt.lower().strip() for prompt in prompts]


def encoded_captions(pipe: Any, prompts: Sequence[str], length: int, rows: int | None = None) -> Condition:
    """The text encoder's states, "text" (batch, length, width), and which are tokens, "text.mask" (batch, length).

    Args:
        pipe: with `tokenizer` and `text_encoder`.
        prompts: at least one.
        length: tokens per prompt.
        rows: how many of them to read, for causal encoders; all unless given.

    Raises:
        ValueError: for a prompt that does not fit, naming it.
    """
    ids, mask = (tensor[:, :rows] for tensor in tokenize(pipe.tokenizer, plain_captions(prompts), length))
    device = pipe.text_encoder.device
    states = pipe.text_encoder(ids.to(device), attention_mask=mask.to(device)).last_hidden_state
    return Condition({"text": states, "text.mask": mask.to(states)})


def caption_rows(pipe: Any, prompt: str, length: int) -> tuple[TokenSpan, ...]:
    """Where a prompt's own tokens sit; what is masked belongs to no part."""
    (caption,) = plain_captions([prompt])
    return (prompt_span(pipe.tokenizer, caption, length, masked=True),)


def caption_concept(pipe: Any, prompt: str, concept: str, length: int) -> tuple[TokenSpan, ...]:
    """Where a concept's tokens sit in a prompt; what is masked belongs to no part.

    Raises:
        ValueError: for a prompt that does not fit or does not mention the concept.
    """
    (caption,) = plain_captions([prompt])
    return (concept_span(pipe.tokenizer, caption, concept, length, masked=True),)


def caption_entry_points(pipe: Any) -> list[EntryPoint]:
    """The first layer of a transformer's caption projection, which all text passes."""
    layer = pipe.transformer.caption_projection.linear_1
    name = "caption_projection.linear_1"
    return [EntryPoint("transformer", name, "text", slice(0, layer.in_features), layer.bias is not None)]
