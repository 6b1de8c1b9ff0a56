"""Which layer of a text encoder to move: groups of weights that move together, and those that no other beats."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What moves together, in the order of a block's forward pass.
_GROUPS = (
    ("self_attn.qkv", r"self_attn\.[qkv]_proj"),
    ("self_attn.out_proj", r"self_attn\.out_proj"),
    ("mlp", r"mlp\.fc[12]"),
)


@dataclass(frozen=True)
class Layer:
    """Weights that move together, and what two gradients say of them.

    Attributes:
        name: "text_encoder.3.mlp": component, block and group.
        depth: the block's place in its encoder, in (0, 1], then the group's within the block.
        weights: names of its weight matrices; biases stay.
        importance: |G_f| / |theta| over all of them.
        alignment: |cos(G_f, G_r)|.
    """

    name: str
    depth: tuple[float, int]
    weights: tuple[str, ...]
    importance: float
    alignment: float


def scored_layers(
    weights: Mapping[str, Tensor], forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]
) -> list[Layer]:
    """The layers of CLIP text encoders: per block q, k and v together, the attention's output, the MLP's two matrices.

    Args:
        weights: by name, component first, as `select_text` has them; others than those of layers are passed over.
        forget, retain: G_f and G_r, by the same names.
    """
    found: dict[tuple[str, int, int], list[str]] = {}
    blocks: dict[str, int] = {}
    for name in weights:
        for place, (_, pattern) in enumerate(_GROUPS):
            if match := re.fullmatch(rf"(\w+)\..*layers\.(\d+)\.{pattern}\.weight", name):
                component, block = match[1], int(match[2])
                found.setdefault((component, block, place), []).append(name)
                blocks[component] = max(blocks.get(component, 0), block + 1)
    layers = []
    for (component, block, place), names in found.items():
        theta, g_f, g_r = (_flat(values, names) for values in (weights, forget, retain))
        layers.append(
            Layer(
                f"{component}.{block}.{_GROUPS[place][0]}",
                ((block + 1) / blocks[component], place),
                tuple(names),
                float(g_f.norm() / theta.norm()),
                float(torch.cosine_similarity(g_f, g_r, dim=0).abs()),
            )
        )
    return layers


def pareto_front(layers: Sequence[Layer]) -> list[Layer]:
    """The layers than which no other is both more important and less aligned, the deepest first.

    What G_f is zero on is no candidate, as an encoder that the loss does not read.
    """

    def beaten(layer: Layer) -> bool:
        return any(o.importance > layer.importance and o.alignment < layer.alignment for o in layers)

    front = [layer for layer in layers if layer.importance > 0 and not beaten(layer)]
    return sorted(front, key=lambda layer: layer.depth, reverse=True)


def _flat(values: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([values[name].detach().double().flatten() for name in names])
