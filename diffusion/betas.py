"""The tables of alphas_cumprod that diffusers' discrete schedulers are configured with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def alphas_cumprod_from_config(config: Mapping[str, Any]) -> Tensor:
    """The table that a discrete scheduler's config describes.

    Args:
        config: `beta_schedule`, `beta_start`, `beta_end`, `num_train_timesteps`, `trained_betas`,
            `rescale_betas_zero_snr`; those missing have diffusers' defaults.

    Returns:
        (num_train_timesteps,) float32, the precision that checkpoints are trained and sampled with: the table equals
        the scheduler's to the bit.

    Raises:
        ValueError: for an unknown `beta_schedule`.
    """
    betas = _betas(config)
    if config.get("rescale_betas_zero_snr"):
        betas = _rescale_to_zero_terminal_snr(betas)
    return torch.cumprod(1.0 - betas, dim=0)


def _betas(config: Mapping[str, Any]) -> Tensor:
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float32)
    kind = config.get("beta_schedule", "linear")
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    n = config.get("num_train_timesteps", 1000)
    if kind == "linear":
        return torch.linspace(start, end, n, dtype=torch.float32)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2
    if kind == "squaredcos_cap_v2":
        # Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17; betas are capped at 0.999.
        level = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        return torch.tensor([min(1 - level[i + 1] / level[i], 0.999) for i in range(n)], dtype=torch.float32)
    raise ValueError(
        f"There is no beta_schedule {kind!r}; use linear, scaled_linear, squaredcos_cap_v2 or trained_betas."
    )


def _rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Lin et al. 2024, arXiv 2305.08891, algorithm 1: sqrt(alphas_cumprod) shifted to end at 0, its start kept."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    level = root**2
    return 1 - torch.cat([level[:1], level[1:] / level[:-1]])
