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
    """Latents that are used and among the `count` largest over rows of codes >= 0 (n, latents): bool (latents,)."""
    values, indices = codes.amax(0).topk(min(count, codes.shape[1]))
    found = torch.zeros(codes.shape[1], dtype=torch.bool, device=codes.device)
    found[indices[values > 0]] = True
    return found


def contrasted(concepts: Sequence[Tensor], retained: Sequence[Tensor], count: int) -> Tensor:
    """F = (union of F_C over concepts C) without (union of F_R over what is retained R): bool (latents,).

    F_C and F_R are the strongest latents over the prompts of C or R together.

    Args:
        concepts: peaks of each concept's prompts, (prompts, latents).
        retained: peaks of the prompts of each thing to leave alone, (prompts, latents).
        count: K', how many latents of each count.
    """
    chosen, others = (
        torch.stack([strongest(codes, count) for codes in groups]).any(0) for groups in (concepts, retained)
    )
    return chosen & ~others


@torch.no_grad()
def lowest_change(source: StatesSource, features: DeactivatedFeatures, prompts: Sequence[str]) -> float:
    """The smallest change that deactivation makes to one of the prompts, among those it reaches; 0 for none."""
    parts = (source.states(prompts[i : i + _BATCH]) for i in range(0, len(prompts), _BATCH))
    changes = torch.cat([features.deactivated(states)[1] for states in parts])
    reached = changes[changes > 0]
    return float(reached.min()) if len(reached) else 0.0
