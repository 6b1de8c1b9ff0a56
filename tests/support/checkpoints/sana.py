"""Sana."""

from __future__ import annotations

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model

from checkpoints.parts import gemma_tokenizer


def tiny_sana() -> SanaPipeline:
    """Sana: flow matching, Gemma 2, 4x8x8 latents, 32x32 images."""
    tokenizer = gemma_tokenizer()
    gemma = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        # States of the size of their differences, or prompts would hardly matter.
        initializer_range=0.3,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    blocks = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("block_types", ("ResBlock", "ResBlock", "EfficientViTBlock")),
            ("block_out_channels", (8, 8, 8)),
            ("layers_per_block", (1, 1, 1)),
            ("qkv_multiscales", ((), (), (5,))),
        )
    }
    vae = AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.41407, **blocks)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(
        tokenizer=tokenizer, text_encoder=Gemma2Model(gemma), vae=vae, transformer=transformer, scheduler=scheduler
    )
