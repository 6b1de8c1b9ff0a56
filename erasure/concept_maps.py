"""Where in a picture a network looks for a concept: cross-attention to the concept's own rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.predictions import Prediction
from sublimate.pipelines.attached.erasing_adapters import cross_attentions


@torch.no_grad()
def concept_maps(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition, rows: Tensor
) -> tuple[Prediction, Tensor]:
    """The prediction, and how much each place attends to some rows of its text, from 0 (least) to 1 (most).

    Attention is averaged over heads, rows and the layers whose resolution is nearest to a quarter of the latents', as
    in Receler (Huang et al. 2024) with its 16 x 16 of 64 x 64, and stretched to [0, 1] for each sample.

    Args:
        denoiser: with cross-attention.
        x_t: (batch, channels, height, width).
        t: (batch,).
        condition: of the batch.
        rows: (batch, length) bool, the concept's rows of its text.

    Returns:
        prediction and maps (batch, 1, h, w), float32.

    Raises:
        ValueError: for attention that normalises its queries, which is not read here.
    """
    height, width = x_t.shape[2:]
    seen: dict[int, list[Tensor]] = {}

    def look(layer: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = inputs[0] if inputs else kwargs["hidden_states"]
        q = layer.to_q(hidden).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        k = layer.to_k(kwargs["encoder_hidden_states"]).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        scores = (layer.scale * q @ k.transpose(-1, -2)).float()
        if (padding := kwargs.get("attention_mask")) is not None:
            scores = scores + padding[:, None]  # (batch, 1, length), as the blocks of diffusers pass it on
        attention = scores.softmax(-1).mean(1)  # (batch, places, length)
        share = (attention * rows[:, None]).sum(-1) / rows.sum(-1, keepdim=True).clamp_min(1)
        seen.setdefault(hidden.shape[1], []).append(share)

    layers: list[Any] = list(cross_attentions(denoiser.network).values())
    if any(layer.norm_q is not None for layer in layers):
        raise ValueError(f"A {type(denoiser.network).__name__} that normalises queries has no concept maps here.")
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        prediction = denoiser(x_t, t, condition)
    finally:
        for handle in handles:
            handle.remove()
    places = min(seen, key=lambda n: abs((height * width / n) ** 0.5 - 4))
    shrink = (height * width / places) ** 0.5
    share = torch.stack(seen[places]).mean(0)
    low, high = share.amin(1, keepdim=True), share.amax(1, keepdim=True)
    maps = (share - low) / (high - low).clamp_min(1e-12)
    return prediction, maps.reshape(len(x_t), 1, round(height / shrink), round(width / shrink))
