"""Models of the published checkpoints' sizes with random weights: nothing is downloaded.

What is measured on them is cost: seconds, bytes, operations. Vocabularies are made up; tables of embeddings have their
real sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import diffusers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from sublimate.pipelines.model import Model

VOCABULARY, LENGTH = 49_408, 77
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxz", "aeiou"
SYLLABLES = [c + v for c in CONSONANTS for v in VOWELS]
BETAS: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's layout and size: characters, the same at the end of a word, merges into made-up words, start, end."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = itertools.product(SYLLABLES, SYLLABLES)
    words = ((a + b, c + "</w>") for a, b in itertools.product(SYLLABLES, SYLLABLES) for c in CONSONANTS)
    merges = itertools.chain(((c, v) for c, v in SYLLABLES), pairs, words)
    merges = list(itertools.islice(merges, VOCABULARY - 2 * len(characters) - 2))
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def clip_config(words: CLIPTokenizer, width: int, layers: int, heads: int, **options: Any) -> CLIPTextConfig:
    """One of CLIP's text encoders."""
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=LENGTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **options,
    )


def t5_tokenizer() -> T5Tokenizer:
    """Letters: every prompt becomes as many tokens as it has of them."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(chr(i), -6.0) for i in range(ord("a"), ord("z") + 1)]
    return T5Tokenizer(vocab=special + letters, extra_ids=0, model_max_length=512)


def t5_xxl() -> T5EncoderModel:
    """The encoder of T5 1.1 XXL: 4.8 billion weights."""
    size = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **size))


def autoencoder(sample_size: int, latent_channels: int = 4, **options: Any) -> AutoencoderKL:
    """The autoencoder that all of them have, with more or fewer latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=latent_channels,
        sample_size=sample_size,
        **options,
    )


def sd15(made: AbstractContextManager[Any]) -> Model:
    """Stable Diffusion 1.5: 860 million weights in the UNet, 512 pixels."""
    words = clip_tokenizer()
    with made:
        networks = {
            "vae": autoencoder(512),
            "text_encoder": CLIPTextModel(clip_config(words, 768, 12, 12, hidden_act="quick_gelu")),
            # The class's defaults are Stable Diffusion's, but for the width of the text.
            "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        }
    pipeline = diffusers.StableDiffusionPipeline(
        **networks,
        tokenizer=words,
        scheduler=DDIMScheduler(**BETAS, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return Model(pipeline, "random weights of Stable Diffusion 1.5's size")


def sdxl(made: AbstractContextManager[Any]) -> Model:
    """Stable Diffusion XL: 2.6 billion weights in the UNet, 1024 pixels."""
    words = clip_tokenizer()
    with made:
        second = clip_config(words, 1280, 32, 20, hidden_act="gelu", projection_dim=1280)
        networks = {
            "vae": autoencoder(1024, scaling_factor=0.13025),
            "text_encoder": CLIPTextModel(clip_config(words, 768, 12, 12, hidden_act="quick_gelu")),
            "text_encoder_2": CLIPTextModelWithProjection(second),
            "unet": UNet2DConditionModel(
                sample_size=128,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
        }
    pipeline = diffusers.StableDiffusionXLPipeline(
        **networks, tokenizer=words, tokenizer_2=clip_tokenizer(), scheduler=EulerDiscreteScheduler(**BETAS)
    )
    return Model(pipeline, "random weights of Stable Diffusion XL's size")


def pixart(made: AbstractContextManager[Any]) -> Model:
    """PixArt-alpha: 611 million weights in the transformer, 512 pixels; T5 XXL reads."""
    with made:
        networks = {
            "vae": autoencoder(512),
            "text_encoder": t5_xxl(),
            "transformer": PixArtTransformer2DModel(
                sample_size=64, caption_channels=4096, use_additional_conditions=False
            ),
        }
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    pipeline = diffusers.PixArtAlphaPipeline(**networks, tokenizer=t5_tokenizer(), scheduler=scheduler)
    return Model(pipeline, "random weights of PixArt-alpha's size")


def flux(made: AbstractContextManager[Any]) -> Model:
    """FLUX.1 [dev]: 11.9 billion weights in the transformer, 1024 pixels; CLIP and T5 XXL read."""
    words = clip_tokenizer()
    unlike = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
    with made:
        networks = {
            "vae": autoencoder(1024, 16, **unlike),
            "text_encoder": CLIPTextModel(clip_config(words, 768, 12, 12, hidden_act="quick_gelu")),
            "text_encoder_2": t5_xxl(),
            # The class's defaults are FLUX.1 [schnell]'s.
            "transformer": FluxTransformer2DModel(guidance_embeds=True),
        }
    pipeline = diffusers.FluxPipeline(
        **networks,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        tokenizer=words,
        tokenizer_2=t5_tokenizer(),
    )
    return Model(pipeline, "random weights of FLUX.1's size")


SIZES: Mapping[str, Callable[[AbstractContextManager[Any]], Model]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "pixart": pixart,
    "flux": flux,
}
"""By name: (what to make the networks within: a device, fake tensors, nothing special) -> the model."""
