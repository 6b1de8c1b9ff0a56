"""SpeedUpNet: an adapter that reads negative prompts in cross-attention, for any fine-tune of its base."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.attachments import read_attachment
from sublimate.pipelines.model import Model
from sublimate.pipelines.negative_attention import NEGATIVE, STRENGTH, attention_layers, reads_negatives
from sublimate.pipelines.placement import placed

NAME = "speedupnet"


class SpeedUpBranch(nn.Module):
    """What one more prompt contributes: scale * (|Z| Y / |Y|) + shift, Y = softmax(Q K^T / sqrt(d)) V.

    Norms are over the channels of each token (all heads), so that no sample sees another and no token the others; the
    released code's is over the whole batch. Scale and shift are per channel.

    Args:
        attn: the layer; keys and values start as copies of its own.
        initial_scale: where the scale starts; the shift starts at 0.
    """

    def __init__(self, attn: Any, initial_scale: float) -> None:
        super().__init__()
        # Where the layer has a LoRA, without it.
        self.to_k, self.to_v = (copy.deepcopy(getattr(own, "base_layer", own)) for own in (attn.to_k, attn.to_v))
        width = self.to_v.out_features
        self.scale, self.shift = nn.Parameter(torch.full((width,), initial_scale)), nn.Parameter(torch.zeros(width))

    def forward(self, heads: int, query: Tensor, z: Tensor, states: Tensor) -> Tensor:
        y = _attended(heads, query, self.to_k(states), self.to_v(states))
        return self.scale * (_size(z) / _size(y).clamp_min(1e-6)).to(y.dtype) * y + self.shift


class SpeedUpAttention(nn.Module):
    """A cross-attention processor with keys and values of its own for the negative prompt (arXiv 2312.08887).

        Z - g (A- - A+),   A- the branch of the negative prompt, A+ an optional second one of the prompt itself

    Z is the layer's own attention, whose queries the branches share, and g = (w - 1) / w for a guidance scale w: the
    guided w Z - (w - 1) Z- is w (Z - g Z-). Without guidance, w = 1, the layer is its base whatever the weights.

    The published scale starts at 1. Without A+ that is about guided attention divided by w, and where both prompts say
    the same, Z shrinks to Z/w: no start for a pretrained network. At 0 the network starts as its base; the first
    gradients reach scale and shift, and through the scale all others from then on. With A+, a start at 1 is sound too:
    Z + g (Z - |Z| Z-/|Z-|), guidance inside attention.

    Args:
        attn: the layer.
        positive: have A+.
        initial_scale: of the branches.
    """

    reads_negatives = True

    def __init__(self, attn: Any, *, positive: bool = False, initial_scale: float = 0.0) -> None:
        super().__init__()
        self.negative = SpeedUpBranch(attn, initial_scale)
        self.positive = SpeedUpBranch(attn, initial_scale) if positive else None
        self.original = attn.processor
        self.defaults: Mapping[str, Any] = {}

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        negative: Tensor | None = None,
        strength: Tensor | None = None,
    ) -> Tensor:
        # Spelled out here, not in `forward`: diffusers reads this signature and drops what it does not find.
        if negative is None or strength is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if attention_mask is not None:
            raise ValueError("SpeedUpNet attends to whole prompts: leave out the mask of the text.")
        return super().__call__(attn, hidden_states, encoder_hidden_states, negative, strength)

    def forward(self, attn: Any, x: Tensor, positive: Tensor, negative: Tensor, strength: Tensor) -> Tensor:
        query = attn.to_q(x)
        z = _attended(attn.heads, query, attn.to_k(positive), attn.to_v(positive))
        change = self.negative(attn.heads, query, z, negative)
        if self.positive is not None:
            change = change - self.positive(attn.heads, query, z, positive)
        z = z - strength.to(z.dtype)[:, None, None] * change
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
        strength: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)


def _attended(heads: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Multi-head attention before the output projection, (batch, tokens, width)."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _size(x: Tensor) -> Tensor:
    """|x| over the channels of each token, (batch, tokens, 1), at least float32."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


def check_text(null: Condition) -> None:
    """Makes sure that a model's network reads whole prompts, padding and all.

    Raises:
        ValueError: for one that masks them.
    """
    if "text.mask" in null:
        raise ValueError("SpeedUpNet attends to whole prompts, and this model masks the padding of its text.")


def install_speedupnet(network: nn.Module, *, positive: bool = False, initial_scale: float = 0.0) -> nn.ModuleList:
    """Puts an untrained adapter into every cross-attention layer of a UNet, in place.

    Its condition then takes a "negative" and an "extra.negative_strength"; without them it works as before.

    Args:
        network: reads no negative prompts yet, and has diffusers' own attention.
        positive, initial_scale: see `SpeedUpAttention`.

    Returns:
        The adapter: what `network` now has besides its own weights.

    Raises:
        ValueError: when the network has no cross-attention that it fits, or reads negative prompts already.
    """
    layers = attention_layers(network).values()
    crossed = [layer for layer in layers if getattr(layer, "is_cross_attention", False)]
    if not crossed:
        raise ValueError(f"A {type(network).__name__} has no cross-attention: SpeedUpNet is for UNets with text.")
    if reads_negatives(network):
        raise ValueError(f"This {type(network).__name__} reads negative prompts already: remove what does so first.")
    if any(a.residual_connection or a.norm_cross or a.group_norm is not None or a.norm_q is not None for a in crossed):
        raise ValueError("SpeedUpNet fits cross-attention without norms or a sum with its own input only.")
    other = [type(a.processor).__name__ for a in crossed if type(a.processor) not in (AttnProcessor, AttnProcessor2_0)]
    if other:
        raise ValueError(
            f"SpeedUpNet takes the place of diffusers' own attention, not of {other[0]}: remove it first."
        )
    for layer in layers:
        if layer not in crossed:
            layer.set_processor(ReadsNothing(layer.processor))
    adapters = []
    for layer in crossed:
        adapter = SpeedUpAttention(layer, positive=positive, initial_scale=initial_scale)
        adapters.append(placed(adapter, layer.to_q.weight.device, layer.to_q.weight.dtype))
        layer.set_processor(adapter)
    return nn.ModuleList(adapters)


def attached_speedupnet(network: nn.Module) -> Mapping[str, Any] | None:
    """The "guidance_scale" and "steps" that the adapter in a network is made for; None without one."""
    found = (layer.processor for layer in attention_layers(network).values())
    return next((p.defaults for p in found if isinstance(p, SpeedUpAttention)), None)


def detach_speedupnet(model: Model) -> None:
    """Takes the adapter off; the model is bit for bit as it was.

    Raises:
        ValueError: when there is none.
    """
    network = model.denoiser.network
    if attached_speedupnet(network) is None:
        raise ValueError(f"{model.source} has no SpeedUpNet attached.")
    for layer in attention_layers(network).values():
        if isinstance(layer.processor, SpeedUpAttention | ReadsNothing):
            original = layer.processor.original
            # A processor that is a module is registered as one; `set_processor` says so in the log if it removes it.
            layer._modules.pop("processor", None)
            layer.set_processor(original)


def attach_speedupnet(model: Model, folder: str | Path) -> None:
    """Plugs a trained adapter into a model of the same architecture, its base or another fine-tune of it.

    `generate(model, prompts, negative_prompt=...)` then tells the adapter the guidance scale and the negative prompt,
    and calls the network once a step.

    Args:
        model: changed in place; `detach_speedupnet` undoes it.
        folder: what the objective `speedupnet` exported.

    Raises:
        ValueError: when the folder holds something else, or the architecture is another; the model is then unchanged.
    """
    check_text(model.null_condition())
    attachment = read_attachment(folder, NAME)
    options = dict(attachment.options)
    adapter = install_speedupnet(model.denoiser.network, positive=options.pop("positive"))
    try:
        attachment.load_into(adapter)
    except ValueError:
        detach_speedupnet(model)
        raise
    for part in adapter.requires_grad_(False).eval():
        cast(SpeedUpAttention, part).defaults = options


def negative_strength(guidance_scale: float | Tensor) -> float | Tensor:
    """g = (w - 1) / w of a guidance scale w of at least 1, a number or (batch,)."""
    return (guidance_scale - 1) / guidance_scale


def told_guidance(model: Model, scale: float, negative_prompt: str | None) -> Condition:
    """What an adapter is told in place of guidance, of batch size 1.

    Args:
        model: has the adapter attached.
        scale: of the guidance that it shall stand in for; 1 is none.
        negative_prompt: None for no text.

    Raises:
        ValueError: for a scale below 1.
    """
    if not scale >= 1:
        raise ValueError(f"SpeedUpNet stands in for a guidance_scale of 1, which is none, or more, not {scale}.")
    states = model.encode_prompts([negative_prompt or ""])["text"]
    strength = torch.full((1,), float(negative_strength(scale)), device=states.device)
    return Condition({NEGATIVE: states, STRENGTH: strength})
