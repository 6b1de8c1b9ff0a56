"""Pixel models without text."""

from __future__ import annotations

from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    UNet2DModel,
)


def _unconditional_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )


def tiny_unconditional() -> DDIMPipeline:
    """An unconditional pixel model, 3x8x8, noise prediction."""
    return DDIMPipeline(unet=_unconditional_unet(), scheduler=DDIMScheduler())


def tiny_edm() -> ConsistencyModelPipeline:
    """An unconditional pixel model, 3x8x8, with EDM's preconditioning."""
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    return ConsistencyModelPipeline(unet=_unconditional_unet(), scheduler=scheduler)
