"""The discriminator on a frozen network's features, whose logit estimates log(p_real/p_student) at any noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.predictions import Activations, Prediction


class MapHead(nn.Module):
    """One logit from a feature map, by two strided convolutions: what is wrong in a picture is wrong in a place.

    Args:
        channels: feature channels.
        width: hidden width.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.GroupNorm(1, channels), *_halving(channels, width), *_halving(width, width))
        self.pooled = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, 1)."""
        # torch 2.13's group norm crashes in the backward pass of channels-last maps on the CPU.
        return self.pooled(self.local(features.float().contiguous()).mean((2, 3)))


class TokenHead(nn.Module):
    """One logit from a sequence of tokens, each looked at by itself.

    Args:
        channels: feature channels.
        width: hidden width.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width), nn.SiLU())
        self.pooled = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        """(batch, tokens, channels) -> (batch, 1)."""
        return self.pooled(self.local(features.float()).mean(1))


class Discriminator(nn.Module):
    """One head per tapped feature.

    Args:
        channels: channels of each tap, by the tap's name.
        width: hidden width of the heads.
        maps: whether features are maps (UNets) or tokens (transformers).
    """

    def __init__(self, channels: Mapping[str, int], width: int = 256, *, maps: bool = True) -> None:
        super().__init__()
        # Module names may not contain dots, so heads are stored in the order of the taps.
        self.channels, self.maps, self.taps = dict(channels), maps, tuple(channels)
        head = MapHead if maps else TokenHead
        self.heads = nn.ModuleList(head(count, width) for count in channels.values())

    def forward(self, seen: Prediction | Activations, t: Tensor) -> Tensor:
        """Logits (batch, heads) from the features of what a network saw at time t; the features know t already."""
        return torch.cat([head(seen.features[tap]) for tap, head in zip(self.taps, self.heads, strict=True)], 1)


@torch.no_grad()
def make_discriminator(
    denoiser: Denoiser, taps: Sequence[str], shape: Sequence[int], condition: Condition, width: int = 256
) -> Discriminator:
    """A discriminator that fits the denoiser's features; their layout is read off one forward pass.

    Args:
        denoiser: the frozen network whose features are judged.
        taps: names of the features.
        shape: shape of one sample, without the batch.
        condition: any condition of batch 1.
        width: hidden width of the heads.
    """
    parameter = next(denoiser.parameters())
    x_t = torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
    features = denoiser.activations(x_t, denoiser.schedule.t_max, condition, features=taps).features
    maps = features[taps[0]].dim() == 4
    return Discriminator({tap: features[tap].shape[1 if maps else 2] for tap in taps}, width, maps=maps)


def _halving(channels: int, width: int) -> tuple[nn.Module, ...]:
    """A convolution that halves height and width, normalised within each sample."""
    return nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(1, width), nn.SiLU()
