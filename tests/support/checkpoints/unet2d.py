"""Pixel models, unconditional and with classes."""

from __future__ import annotations

from typing import Any

from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    UNet2DModel,
)


def _unet(**options: Any) -> UNet2DModel:
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
        **options,
    )


def tiny_unconditional() -> DDIMPipeline:
    """An unconditional pixel model, 3x8x8, noise prediction."""
    return DDIMPipeline(unet=_unet(), scheduler=DDIMScheduler())


def tiny_edm() -> ConsistencyModelPipeline:
    """An unconditional pixel model, 3x8x8, with EDM's preconditioning."""
    return ConsistencyModelPipeline(unet=_unet(), scheduler=_edm())


def tiny_edm_classes() -> ConsistencyModelPipeline:
    """The same with ten classes, none of which stands for none."""
    return ConsistencyModelPipeline(unet=_unet(num_class_embeds=10), scheduler=_edm())


def tiny_class_conditional() -> DDIMPipeline:
    """A pixel model with ten classes, noise prediction, in a pipeline that passes none on."""
    return DDIMPipeline(unet=_unet(num_class_embeds=10), scheduler=DDIMScheduler())


def _edm() -> CMStochasticIterativeScheduler:
    return CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
