"""Adds a small network's answer to what cross-attention layers say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from sublimate.pipelines.edit_attachment import Built, Hook
from sublimate.pipelines.model import Model


class Bottleneck(nn.Sequential):
    """up(GELU(down(x))), which starts as zero: (..., width) -> (..., width).

    Args:
        width: of the features.
        rank: of the middle.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__(nn.Linear(width, rank), nn.GELU(), nn.Linear(rank, width))
        last = cast(nn.Linear, self[2])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


def cross_attentions(network: nn.Module) -> dict[str, nn.Module]:
    """The layers through which a UNet's (or PixArt's) image tokens read text, by name; none where text is joint."""
    found = {name: module for name, module in network.named_modules() if name.endswith(".attn2")}
    joint = any(getattr(module, "add_k_proj", None) is not None for module in network.modules())
    return {} if joint else found


def bottlenecks(network: nn.Module, rank: int) -> nn.ModuleDict:
    """A bottleneck for each of a network's cross-attention layers, by its name with dashes for dots."""
    layers = cross_attentions(network)
    return nn.ModuleDict(
        {key_of(name): Bottleneck(cast(Any, layer).to_out[0].out_features, rank) for name, layer in layers.items()}
    )


def key_of(name: str) -> str:
    """A layer's name as a module dictionary takes it."""
    return name.replace(".", "-")


def adding(adapter: nn.Module) -> Hook:
    """A forward hook that adds the adapter's answer to a layer's output, in the output's precision."""
    dtype = next(adapter.parameters()).dtype

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + adapter(output.to(dtype)).to(output.dtype)

    return hook


def build(model: Model, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Built:
    """The kind: `options` is the rank, `tensors` are those of `bottlenecks`."""
    component = model.backbone.network_attribute
    network = model.component(component)
    adapters = bottlenecks(network, options["rank"])
    own = {name: tensor.shape for name, tensor in adapters.state_dict().items()}
    if own != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError(f"These adapters do not fit the {component} of {model.source}: they belong to another model.")
    adapters.load_state_dict(dict(tensors))
    hooks = {f"{component}/{name}": adding(adapters[key_of(name)]) for name in cross_attentions(network)}
    return Built(adapters, hooks)
