"""Which features of a sparse autoencoder stand for a concept, and when a prompt is about it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sublimate.pipelines.attached.deactivated_features import DeactivatedFeatures
from sublimate.pipelines.sparse_autoencoder import SparseAutoencoder
from sublimate.training.sparse_autoencoder import StatesSource

_BATCH = 64


@torch.no_grad()
def peaks(source: StatesSource, autoencoder: SparseAutoencoder, prompts: Sequence[str]) -> Tensor:
    """The largest code of each latent over a prompt's tokens but the first: (prompts, latents)."""
    parts = (source.states(prompts[i : i + _BATCH]) for i in range(0, len(prompts), _BATCH))
    return torch.cat([autoencoder.encode(states).amax(1) for states in parts])


def strongest(codes: Tensor, count: int) -> Tensor:
    """Latents that are used and among the `count` largest of some row of codes >= 0 (n, latents): bool (latents,)."""
    values, indices = codes.topk(min(count, codes.shape[1]), dim=1)
    found = torch.zeros(codes.shape[1], dtype=torch.bool, device=codes.device)
    found[indices[values > 0]] = True
    return found


def contrasted(concepts: Sequence[Tensor], retained: Tensor, count: int) -> Tensor:
    """F = (union of F_C over concepts C) without F_R: bool (latents,).

    F_C are the strongest latents over a concept's prompts together, F_R the union of each retained prompt's.

    Args:
        concepts: peaks of each concept's prompts, (prompts, latents).
        retained: peaks of prompts to leave alone, (prompts, latents).
        count: K', how many latents of a concept, and of a retained prompt, count.
    """
    chosen = torch.stack([strongest(codes.amax(0, keepdim=True), count) for codes in concepts]).any(0)
    return chosen & ~strongest(retained, count)


@torch.no_grad()
def lowest_change(source: StatesSource, features: DeactivatedFeatures, prompts: Sequence[str]) -> float:
    """The smallest change that deactivation makes to one of the prompts, among those it reaches; 0 for none."""
    parts = (source.states(prompts[i : i + _BATCH]) for i in range(0, len(prompts), _BATCH))
    changes = torch.cat([features.deactivated(states)[1] for states in parts])
    reached = changes[changes > 0]
    return float(reached.min()) if len(reached) else 0.0
