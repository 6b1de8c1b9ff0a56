"""SpeedUpNet: an adapter that reads negative prompts in cross-attention, for any fine-tune of its base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sublimate.pipelines.attachments import read_attachment
from sublimate.pipelines.model import Model
from sublimate.pipelines.negative_attention import attention_layers, reads_negatives

NAME = "speedupnet"


class SpeedUpAttention(nn.Module):
    """A cross-attention processor with keys and values of its own for the negative prompt (arXiv 2312.08887).

        Z - Z', Z' = scale * (|Z| Z- / |Z-|) + shift,   Z- = softmax(Q K-^T / sqrt(d)) V-

    Z is the layer's own attention, Q its queries; norms are over the channels of each token, so that no sample sees
    another. Scale and shift are per channel. The published scale starts at 1, which takes off as much as the layer
    adds; here it starts at 0, where the network is its base.

    Args:
        attn: the layer; keys and values start as copies of its own.
    """

    reads_negatives = True

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.to_k_negative, self.to_v_negative = copy.deepcopy(attn.to_k), copy.deepcopy(attn.to_v)
        width = attn.to_k.out_features
        self.scale, self.shift = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        negative: Tensor | None = None,
    ) -> Tensor:
        # Spelled out here, not in `forward`: diffusers reads this signature and drops what it does not find.
        return super().__call__(attn, hidden_states, encoder_hidden_states, negative)

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, negative: Tensor | None
    ) -> Tensor:
        query = attn.to_q(hidden_states)
        z = _attended(attn.heads, query, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        if negative is not None:
            away = _attended(attn.heads, query, self.to_k_negative(negative), self.to_v_negative(negative))
            size = z.norm(dim=-1, keepdim=True) / away.norm(dim=-1, keepdim=True).clamp_min(1e-6)
            z = z - (self.scale * (size * away) + self.shift)
        return attn.to_out[1](attn.to_out[0](z)) / attn.rescale_output_factor


class ReadsNothing:
    """A self-attention layer's own processor, which is told of no negative prompt."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        negative: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)


def _attended(heads: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Multi-head attention before the output projection, (batch, tokens, width)."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def install_speedupnet(network: nn.Module) -> nn.ModuleList:
    """Puts an adapter that changes nothing yet into every cross-attention layer of a UNet, in place.

    Returns:
        The adapter: what `network` now has besides its own weights.

    Raises:
        ValueError: when the network has no cross-attention that it fits, or reads negative prompts already.
    """
    layers = attention_layers(network)
    crossed = [layer for layer in layers if getattr(layer, "is_cross_attention", False)]
    if not crossed:
        raise ValueError(f"A {type(network).__name__} has no cross-attention: SpeedUpNet is for UNets with text.")
    if reads_negatives(network):
        raise ValueError(f"This {type(network).__name__} reads negative prompts already: remove what does so first.")
    if any(a.residual_connection or a.norm_cross or a.group_norm is not None or a.norm_q is not None for a in crossed):
        raise ValueError("SpeedUpNet fits cross-attention without norms or a sum with its own input only.")
    for layer in layers:
        if not getattr(layer, "is_cross_attention", False):
            layer.set_processor(ReadsNothing(layer.processor))
    adapters = []
    for layer in crossed:
        adapter = SpeedUpAttention(layer).to(layer.to_k.weight.device, layer.to_k.weight.dtype)
        adapter.original = layer.processor
        adapters.append(adapter)
        layer.set_processor(adapter)
    return nn.ModuleList(adapters)


def detach_speedupnet(model: Model) -> None:
    """Takes the adapter off; the model is bit for bit as it was.

    Raises:
        ValueError: when there is none.
    """
    layers = attention_layers(model.denoiser.network)
    if not any(isinstance(layer.processor, SpeedUpAttention) for layer in layers):
        raise ValueError(f"{model.source} has no SpeedUpNet attached.")
    for layer in layers:
        if isinstance(layer.processor, SpeedUpAttention | ReadsNothing):
            original = layer.processor.original
            # Attention registers processors that are modules; what takes their place may be none.
            layer._modules.pop("processor", None)
            layer.set_processor(original)


def attach_speedupnet(model: Model, folder: str | Path) -> None:
    """Plugs a trained adapter into a model of the same architecture, its base or another fine-tune of it.

    `generate(model, prompts, steps=4, guidance_scale=1.0, negative_prompt=...)` then steers by the adapter.

    Args:
        model: changed in place; `detach_speedupnet` undoes it.
        folder: what the objective `speedupnet` exported.

    Raises:
        ValueError: when the folder holds something else, or the architecture is another; the model is then unchanged.
    """
    attachment = read_attachment(folder, NAME)
    adapter = install_speedupnet(model.denoiser.network)
    try:
        attachment.load_into(adapter)
    except ValueError:
        detach_speedupnet(model)
        raise
    adapter.requires_grad_(False).eval()
