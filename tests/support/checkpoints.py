"""Tiny checkpoints of every supported family: real diffusers and transformers classes, random weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = ("a", "cat", "dog", "gogh", "in", "of", "painting", "photo", "red", "seven", "style", "the", "van")
"""Words that are one token each in the tiny vocabularies; anything else falls into characters."""
MODEL_MAX_LENGTH = 16


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's layout at tiny size: characters, the same at the end of a word, the merges, start, end."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        *pieces, last = word
        pieces.append(last + "</w>")
        left = pieces[0]
        for piece in pieces[1:]:
            merges[left, piece] = None
            left += piece
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=MODEL_MAX_LENGTH)


def t5_tokenizer(length: int = 512) -> T5Tokenizer:
    """A unigram vocabulary of the same words and the letters."""
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces = [(f"▁{word}", -3.0) for word in WORDS] + [(letter, -6.0) for letter in letters]
    return T5Tokenizer(vocab=special + pieces, extra_ids=0, model_max_length=length)


def roberta_tokenizer() -> RobertaTokenizer:
    """RoBERTa's layout at tiny size: special tokens and characters."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return RobertaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=80)


def _clip_config(tokenizer: CLIPTokenizer, **options: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MODEL_MAX_LENGTH,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def _autoencoder(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def _stable_diffusion(
    prediction_type: str, kind: Any = StableDiffusionPipeline, *, vae: AutoencoderKL | None = None, **options: Any
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
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        set_alpha_to_one=False,
        steps_offset=1,
        clip_sample=False,
    )
    if kind is not StableDiffusionUpscalePipeline:
        options["requires_safety_checker"] = False
    return kind(
        vae=_autoencoder() if vae is None else vae,
        text_encoder=CLIPTextModel(_clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        **options,
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


def tiny_sd() -> StableDiffusionPipeline:
    """Stable Diffusion 1.x: noise prediction, 4x8x8 latents, 16x16 images, 16 tokens of width 16."""
    return _stable_diffusion("epsilon")


def tiny_sd_v() -> StableDiffusionPipeline:
    """Stable Diffusion 2.x: the same with v-prediction."""
    return _stable_diffusion("v_prediction")


def tiny_inpainting() -> StableDiffusionInpaintPipeline:
    """Stable Diffusion inpainting: the same UNet with 9 channels, v-prediction."""
    vae = _autoencoder()
    # A posterior as narrow as real ones are, since the stock pipeline samples it.
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -30
    return _stable_diffusion("v_prediction", StableDiffusionInpaintPipeline, vae=vae, in_channels=9)


def tiny_upscaling() -> StableDiffusionUpscalePipeline:
    """Stable Diffusion's upscaler: 7 channels, 8x8 small images, noise levels from 0 to 35, v-prediction."""
    return _stable_diffusion(
        "v_prediction",
        StableDiffusionUpscalePipeline,
        vae=_autoencoder(scaling_factor=0.08333),
        in_channels=7,
        num_class_embeds=40,
        max_noise_level=35,
        low_res_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100),
    )


def tiny_unconditional() -> DDIMPipeline:
    """An unconditional pixel model, 3x8x8, noise prediction."""
    return DDIMPipeline(unet=_unconditional_unet(), scheduler=DDIMScheduler())


def tiny_edm() -> ConsistencyModelPipeline:
    """An unconditional pixel model, 3x8x8, with EDM's preconditioning."""
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    return ConsistencyModelPipeline(unet=_unconditional_unet(), scheduler=scheduler)


def tiny_sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3: flow matching, two CLIPs and a T5, 4x8x8 latents, 16x16 images."""
    tokenizer = clip_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    t5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(_clip_config(tokenizer, projection_dim=16)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer, projection_dim=16)),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=t5_tokenizer(),
    )


def tiny_audio() -> AudioLDM2Pipeline:
    """AudioLDM 2: noise prediction, 4x8x4 latents, spectrograms of 16 frames and 8 bins, 256 samples of sound."""
    tokenizer = roberta_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        # RoBERTa counts positions from behind its padding token.
        "max_position_embeddings": tokenizer.model_max_length + 2,
    }
    # What hears; only the ranking of several waveforms needs it.
    sound = {
        "spec_size": 32,
        "num_mel_bins": 8,
        "window_size": 4,
        "hidden_size": 16,
        "patch_embeds_hidden_size": 4,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 2,
    }
    t5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    size = {"vocab_size": 8, "n_positions": 64, "n_embd": 24, "n_layer": 1, "n_head": 2}
    gpt2 = GPT2Config(**size, bos_token_id=0, eos_token_id=0, max_new_tokens=4)
    hifi_gan = SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=8,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        # Loud enough that a wrong spectrogram is heard.
        initializer_range=0.3,
    )
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, 24, 32), (None, 24, 32)),
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return AudioLDM2Pipeline(
        vae=_autoencoder(in_channels=1, out_channels=1),
        text_encoder=ClapModel(ClapConfig(text_config=text, audio_config=sound, projection_dim=16)),
        text_encoder_2=T5EncoderModel(t5),
        projection_model=AudioLDM2ProjectionModel(16, 32, 24),
        language_model=GPT2LMHeadModel(gpt2),
        tokenizer=tokenizer,
        tokenizer_2=t5_tokenizer(MODEL_MAX_LENGTH),
        feature_extractor=ClapFeatureExtractor(feature_size=8),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.0015,
            beta_end=0.0195,
            beta_schedule="scaled_linear",
            set_alpha_to_one=False,
            steps_offset=1,
            clip_sample=False,
        ),
        vocoder=SpeechT5HifiGan(hifi_gan),
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    build.__name__: build
    for build in (
        tiny_sd,
        tiny_sd_v,
        tiny_inpainting,
        tiny_upscaling,
        tiny_unconditional,
        tiny_edm,
        tiny_sd3,
        tiny_audio,
    )
}


def save(name: str, folder: Path) -> Path:
    """Builds a checkpoint with a seed of its own, without touching the global random state, and saves it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        pipeline = BUILDERS[name]()
    pipeline.save_pretrained(folder)
    return folder
