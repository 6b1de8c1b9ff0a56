"""Stable Diffusion 1.x and 2.x, and what was trained from them to be shown pictures."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel

from checkpoints.parts import autoencoder, clip_config, clip_tokenizer

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""The noise levels of Stable Diffusion, as its schedulers are told them."""


def stable_diffusion(
    prediction_type: str,
    kind: Any = StableDiffusionPipeline,
    *,
    vae: AutoencoderKL | None = None,
    scheduler: Any = None,
    **options: Any,
) -> Any:
    """A pipeline of `kind`; `options` are the UNet's, where it has such, and the pipeline's."""
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=options.pop("in_channels", 4),
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        num_class_embeds=options.pop("num_class_embeds", None),
        time_cond_proj_dim=options.pop("time_cond_proj_dim", None),
    )
    if scheduler is None:
        scheduler = DDIMScheduler(**NOISE, prediction_type=prediction_type, set_alpha_to_one=False, clip_sample=False)
    if kind is not StableDiffusionUpscalePipeline:
        options["requires_safety_checker"] = False
    return kind(
        vae=autoencoder() if vae is None else vae,
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        **options,
    )


def tiny_sd() -> StableDiffusionPipeline:
    """Stable Diffusion 1.x: noise prediction, 4x8x8 latents, 16x16 images, 16 tokens of width 16."""
    return stable_diffusion("epsilon")


def tiny_sd_v() -> StableDiffusionPipeline:
    """Stable Diffusion 2.x: the same with v-prediction."""
    return stable_diffusion("v_prediction")


def tiny_inpainting() -> StableDiffusionInpaintPipeline:
    """Stable Diffusion inpainting: the same UNet with 9 channels, v-prediction."""
    vae = autoencoder()
    # A posterior as narrow as real ones are, since the stock pipeline samples it.
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -30
    return stable_diffusion("v_prediction", StableDiffusionInpaintPipeline, vae=vae, in_channels=9)


def tiny_upscaling() -> StableDiffusionUpscalePipeline:
    """Stable Diffusion's upscaler: 7 channels, 8x8 small images, noise levels from 0 to 35, v-prediction."""
    return stable_diffusion(
        "v_prediction",
        StableDiffusionUpscalePipeline,
        vae=autoencoder(scaling_factor=0.08333),
        in_channels=7,
        num_class_embeds=40,
        max_noise_level=35,
        low_res_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100),
    )
