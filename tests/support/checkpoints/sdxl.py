"""Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from checkpoints.parts import autoencoder, clip_config, clip_tokenizer
from checkpoints.stable_diffusion import NOISE


def sdxl(scheduler: Any, *, force_zeros: bool = True, layers: int = 2, **unet: Any) -> StableDiffusionXLPipeline:
    """A pipeline with this scheduler and `layers` in its second encoder; `unet` are further options of the UNet."""
    tokenizer = clip_tokenizer()
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=16 + 24,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
        **unet,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(
            clip_config(tokenizer, hidden_size=24, num_hidden_layers=layers, projection_dim=20)
        ),
        tokenizer_2=clip_tokenizer(),
        unet=network,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


def euler(**options: Any) -> EulerDiscreteScheduler:
    """The scheduler that Stable Diffusion XL is published with."""
    return EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", **options)


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: noise prediction, two CLIPs of 16 tokens, no text is zeros; 4x8x8 latents, 16x16 images."""
    return sdxl(euler())


def tiny_sdxl_v() -> StableDiffusionXLPipeline:
    """The same with v-prediction, and the empty prompt for no text."""
    return sdxl(euler(prediction_type="v_prediction"), force_zeros=False)
