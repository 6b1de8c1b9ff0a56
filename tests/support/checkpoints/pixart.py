"""PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5EncoderModel

from checkpoints.parts import autoencoder, t5_config, t5_tokenizer


def _pixart(kind: Any) -> Any:
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
    )
    return kind(
        tokenizer=t5_tokenizer(),
        text_encoder=T5EncoderModel(t5_config()),
        vae=autoencoder(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def tiny_pixart() -> PixArtAlphaPipeline:
    """PixArt-alpha as for 512 pixels: noise and variance prediction, 4x8x8 latents, 16x16 images, 120 tokens."""
    return _pixart(PixArtAlphaPipeline)


def tiny_pixart_sigma() -> PixArtSigmaPipeline:
    """PixArt-Sigma: the same with 300 tokens."""
    return _pixart(PixArtSigmaPipeline)
