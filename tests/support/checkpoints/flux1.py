"""FLUX.1."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from checkpoints.parts import autoencoder, clip_config, clip_tokenizer, t5_tokenizer


def _flux(scheduler: FlowMatchEulerDiscreteScheduler, *, guidance_embeds: bool, length: int) -> FluxPipeline:
    tokenizer = clip_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    t5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    return FluxPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=t5_tokenizer(length),
    )


def tiny_flux() -> FluxPipeline:
    """FLUX.1 [dev]: told the guidance scale, a shift by the image's size, 4x8x8 latents, 24 tokens of T5."""
    # Sizes from which and to which the shift grows, around this checkpoint's own 16 patches.
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
    )
    return _flux(scheduler, guidance_embeds=True, length=24)


def tiny_flux_schnell() -> FluxPipeline:
    """FLUX.1 [schnell]: not told the guidance scale, for a few steps without shift."""
    return _flux(FlowMatchEulerDiscreteScheduler(shift=1.0), guidance_embeds=False, length=24)
