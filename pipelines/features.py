"""Feature taps: what inner modules of a network return during one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sublimate.diffusion.denoisers import Ended, Only


@contextmanager
def tapped(network: nn.Module, names: Sequence[str], *, item: int = 0) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of named modules while the network runs within this context.

    Every use has its own hooks and its own result, so calls of one network may nest and follow each other; the hooks
    are gone afterwards, also when the call fails. Gradients flow through what is collected.

    Args:
        network: whose modules.
        names: as in `named_modules`; of `Only` names the last that is there ends the call with `Ended`.
        item: which one to take where a module returns several.

    Yields:
        name -> output, filled once the network has run.

    Raises:
        ValueError: for a name the network does not have.
    """
    features: dict[str, Tensor] = {}
    handles = []
    try:
        for name in names:
            handles.append(_module(network, name).register_forward_hook(_keep(features, name, item)))
        if names and isinstance(names, Only):
            handles.extend(_module(network, name).register_forward_hook(_end(features, len(names))) for name in names)
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _module(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{type(network).__name__} has no module {name!r} to read features from.") from error


def _keep(features: dict[str, Tensor], name: str, item: int) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        features[name] = output if isinstance(output, Tensor) else output[item]

    return hook


def _end(features: dict[str, Tensor], count: int) -> Any:
    def hook(*_: Any) -> None:
        if len(features) == count:
            raise Ended(features)

    return hook


def unet_taps(network: Any) -> tuple[str, ...]:
    """A UNet's blocks, by name: the middle first, whose output sees the whole picture."""
    downs = tuple(f"down_blocks.{i}" for i in range(len(network.down_blocks)))
    ups = tuple(f"up_blocks.{i}" for i in range(len(network.up_blocks)))
    return ("mid_block", *downs, *ups)


def block_taps(network: Any, first: int) -> tuple[str, ...]:
    """A transformer's blocks, by name: those first that a discriminator looks at, `first` of them.

    They are spread over the whole depth (LADD, Sauer et al. 2024, arXiv 2403.12015).
    """
    count = len(network.transformer_blocks)
    spread = [round((i + 1) * (count - 1) / first) for i in range(first)]
    return tuple(f"transformer_blocks.{i}" for i in dict.fromkeys([*spread, *range(count)]))


def unet_code(network: Any) -> tuple[str, ...]:
    """The modules whose outputs are all that a UNet's way up is given: skip connections in order, and the middle."""
    names = ["conv_in"]
    for i, block in enumerate(network.down_blocks):
        kind = "attentions" if getattr(block, "attentions", None) else "resnets"
        names += [f"down_blocks.{i}.{kind}.{j}" for j in range(len(getattr(block, kind)))]
        names += [f"down_blocks.{i}.downsamplers.{j}" for j in range(len(block.downsamplers or ()))]
    return (*names, "mid_block")
