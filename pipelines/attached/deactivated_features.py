"""Scales chosen features of a sparse autoencoder in a text encoder, for prompts in which they matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sublimate.pipelines.edit_attachment import Built
from sublimate.pipelines.model import Model
from sublimate.pipelines.sparse_autoencoder import SparseAutoencoder

Gate = Literal["max", "mean"]
"""Over a prompt's tokens: what the gate compares with its threshold."""


class DeactivatedFeatures(nn.Module):
    """e' = W_dec (s z) + b_pre for prompts whose change reaches a threshold; the others keep e, bit by bit.

    The change of a prompt is the largest (or mean) over its tokens of |W_dec (s z - z)|^2 / width: how far the
    reconstruction moves. The first token, which starts every prompt and has seen none of it, is never touched.

    Args:
        autoencoder: of the states.
        scale: s, one number per latent; 1 leaves it alone.
        threshold: of the change.
        gate: the largest or the mean over tokens.
    """

    scale: Tensor

    def __init__(self, autoencoder: SparseAutoencoder, scale: Tensor, threshold: float, gate: Gate) -> None:
        super().__init__()
        self.autoencoder, self.threshold, self.gate = autoencoder, threshold, gate
        self.register_buffer("scale", scale)

    def deactivated(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """e' of states without the first token, (prompts, tokens, width), and each prompt's change, (prompts,)."""
        codes = self.autoencoder.encode(states)
        scaled = codes * self.scale
        moved = ((scaled - codes) @ self.autoencoder.decoder).square().mean(-1)
        return self.autoencoder.decode(scaled), moved.amax(1) if self.gate == "max" else moved.mean(1)

    def forward(self, states: Tensor) -> Tensor:
        """(prompts, tokens, width), in any precision, and so the result."""
        with torch.autocast(states.device.type, enabled=False):
            deactivated, change = self.deactivated(states[:, 1:].float())
        edited = torch.cat([states[:, :1], deactivated.to(states.dtype)], dim=1)
        return torch.where((change >= self.threshold)[:, None, None], edited, states)


def residual_blocks(encoder: nn.Module) -> list[str]:
    """The names of a CLIP text encoder's blocks, whose outputs are its residual stream; none for other encoders."""
    names = (name for name, _ in encoder.named_modules())
    # Some releases of transformers put a wrapper around the text model.
    return [n for n in names if n.removeprefix("text_model.").rpartition(".")[0] == "encoder.layers"]


def build(model: Model, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Built:
    """The kind: `options` are component, block, k, threshold and gate, `tensors` the autoencoder's and scale."""
    component, block = options["component"], options["block"]
    encoder = model.component(component)
    names = residual_blocks(encoder)
    if block >= len(names):
        raise ValueError(f"The {component} of {model.source} has no block {block} of CLIP: the edit is another's.")
    weights = {name: tensor for name, tensor in tensors.items() if name != "scale"}
    latents, width = weights["decoder"].shape
    if cast(Any, encoder).config.hidden_size != width:
        raise ValueError(f"The {component} of {model.source} is not {width} wide: the edit belongs to another model.")
    autoencoder = SparseAutoencoder(width, latents, options["k"])
    autoencoder.load_state_dict(weights)
    features = DeactivatedFeatures(autoencoder, tensors["scale"].clone(), options["threshold"], options["gate"])
    return Built(features, {f"{component}/{names[block]}": lambda module, inputs, output: features(output)})
