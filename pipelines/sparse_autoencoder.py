"""A top-k sparse autoencoder: states as sums of few directions out of many."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SparseAutoencoder(nn.Module):
    """z = ReLU(TopK(W_enc (e - b_pre) + b_lat)), ê = W_dec z + b_pre (Gao et al. 2024, arXiv 2406.04093, eqs. 3-4).

    Args:
        width: of a state e.
        latents: how many directions there are; row j of `decoder` is that of latent j, column j of W_dec.
        k: how many of them a state may use.

    Raises:
        ValueError: when k is not between 1 and the number of latents.
    """

    def __init__(self, width: int, latents: int, k: int) -> None:
        super().__init__()
        if not 1 <= k <= latents:
            raise ValueError(f"A state uses between 1 and all {latents} latents, not k = {k}: lower k.")
        self.k = k
        self.encoder = nn.Parameter(torch.zeros(latents, width))
        self.latent_bias = nn.Parameter(torch.zeros(latents))
        self.decoder = nn.Parameter(torch.zeros(latents, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def activations(self, states: Tensor) -> Tensor:
        """W_enc (e - b_pre) + b_lat: (..., width) -> (..., latents)."""
        return nn.functional.linear(states - self.bias, self.encoder, self.latent_bias)

    def encode(self, states: Tensor) -> Tensor:
        """z >= 0, at most k of them above 0: (..., width) -> (..., latents)."""
        return largest(self.activations(states), self.k)

    def decode(self, codes: Tensor) -> Tensor:
        """ê: (..., latents) -> (..., width)."""
        return codes @ self.decoder + self.bias

    def forward(self, states: Tensor) -> Tensor:
        return self.decode(self.encode(states))


def largest(activations: Tensor, k: int) -> Tensor:
    """ReLU(TopK(.)): all but the k largest of the last dimension, and what is negative, becomes 0."""
    values, indices = activations.topk(k, dim=-1)
    return torch.zeros_like(activations).scatter(-1, indices, values.relu())
