"""Self-attention that looks away from an object: what Attentive Eraser changes inside a UNet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from diffusers.models.transformers import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F


class Redirection:
    """What redirected layers are told, shared by all of a network's.

    Attributes:
        objects: (batch, 1, height, width) float, 1 on each sample's object, at the latents' resolution; None redirects
            nothing. A sample without an object is attended to as ever.
        similarity: the factor of the logits of object rows; 1 leaves them as they are.
        size: height and width of the map that the transformer now running was given.
    """

    def __init__(self) -> None:
        self.objects: Tensor | None = None
        self.similarity = 1.0
        self.size = (0, 0)

    def rows(self) -> Tensor | None:
        """Which rows of the running layer's map show the object, (batch, rows) bool; None for none.

        Pooling takes the maximum, so that a thin object survives. Where it would cover a sample's whole map there is
        nothing else to look at, and that sample is left alone at this resolution.
        """
        if self.objects is None:
            return None
        pooled = F.adaptive_max_pool2d(self.objects, self.size).flatten(1) > 0
        return pooled & ~pooled.all(1, keepdim=True)


class RedirectedAttention:
    """An attention processor for self-attention that sees no object (arXiv 2412.12974, AAS).

    With logits S = Q K^T / sqrt(d) and the object's rows M,

        background rows: softmax(S - inf [key in M]),    object rows: softmax(s S - inf [key in M])

    with a similarity suppression s < 1, which flattens what object rows prefer to look at and keeps them from growing
    the object again. Both come from one call of the processor that was there before, whatever kernel it runs: hidden
    keys are an additive mask (batch, 1, keys), and scaling a query scales its logits. S itself is never formed here.
    """

    def __init__(self, original: Any, redirection: Redirection) -> None:
        self.original, self.redirection = original, redirection

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        # The parameters are spelled out because diffusers drops what it does not find in this signature.
        rows = self.redirection.rows()
        if rows is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        hidden = torch.zeros_like(rows, dtype=hidden_states.dtype).masked_fill(rows, -torch.inf)[:, None]
        hidden = hidden if attention_mask is None else hidden + attention_mask
        if self.redirection.similarity != 1:
            attn = _ScaledQueries(attn, torch.where(rows, self.redirection.similarity, 1.0)[..., None])
        return self.original(attn, hidden_states, encoder_hidden_states, hidden, temb, **kwargs)


class _ScaledQueries:
    """An attention layer whose queries are multiplied row by row."""

    def __init__(self, attn: Any, factors: Tensor) -> None:
        self.attn, self.factors = attn, factors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attn, name)

    def to_q(self, hidden_states: Tensor) -> Tensor:
        return self.attn.to_q(hidden_states) * self.factors.to(hidden_states.dtype)


def self_attention(network: Any) -> list[Any]:
    """The self-attention layers of a UNet's transformers, in the order in which they run."""
    return [
        layer
        for part in (network.down_blocks, network.mid_block, network.up_blocks)
        for transformer in _transformers(part)
        for layer in transformer.modules()
        if hasattr(layer, "set_processor") and not layer.is_cross_attention
    ]


@contextmanager
def redirected(network: nn.Module, *, first: float = 0.0) -> Iterator[Redirection]:
    """Within this context self-attention heeds the redirection that is yielded; afterwards all is as it was.

    Choose an attention kernel first: `set_attention` acts on the processors that are there.

    Args:
        network: a UNet.
        first: the share of self-attention layers, in the order in which they run, that stay as they are.

    Raises:
        ValueError: when the layers' projections are fused, or queries are normalised, which undoes their scaling.
    """
    layers = self_attention(network)
    layers = layers[int(first * len(layers)) :]
    # Layers stay marked as fused when their projections no longer are; the processors tell.
    if any(isinstance(getattr(p, "original", p), FusedAttnProcessor2_0) for p in (x.processor for x in layers)):
        raise ValueError("Redirection does not fit fused projections: call unfuse_qkv_projections first.")
    if any(getattr(layer, "norm_q", None) is not None for layer in layers):
        raise ValueError(
            f"Redirection scales queries, which this {type(network).__name__} normalises: it does not fit."
        )
    redirection = Redirection()

    # The map's size as it really is: neither its shape nor the way there can be read off the number of rows.
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        redirection.size = tuple((args[0] if args else kwargs["hidden_states"]).shape[-2:])

    before = [layer.processor for layer in layers]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in _transformers(network)]
    try:
        for layer in layers:
            layer.set_processor(RedirectedAttention(layer.processor, redirection))
        yield redirection
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.set_processor(processor)
        for hook in hooks:
            hook.remove()


def _transformers(part: nn.Module | None) -> list[nn.Module]:
    return [] if part is None else [m for m in part.modules() if isinstance(m, Transformer2DModel)]
