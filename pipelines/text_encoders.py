"""What CLIP's text encoders say of prompts, as Stable Diffusion XL and its successors read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sublimate.pipelines.tokens import tokenize


def penultimate_states(
    tokenizer: Any, encoder: Any, prompts: Sequence[str], *, beginning: bool = False
) -> tuple[Tensor, Tensor]:
    """The states before an encoder's last layer, and its pooled state; differentiable in its weights.

    Args:
        tokenizer: of the encoder.
        encoder: a `CLIPTextModel`, or a `CLIPTextModelWithProjection`.
        prompts: at least one.
        beginning: of a prompt that is too long, read as many tokens as fit.

    Returns:
        (prompts, tokens, width), and the state of the end token, projected where the encoder does so,
        (prompts, projection).

    Raises:
        ValueError: for a prompt longer than the tokenizer's limit, naming it.
    """
    ids, _ = tokenize(tokenizer, prompts, beginning=beginning)
    states = encoder(ids.to(encoder.device), output_hidden_states=True)
    return states.hidden_states[-2], states.text_embeds if "text_embeds" in states else states.pooler_output
