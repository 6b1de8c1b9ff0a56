"""AudioLDM 2."""

from __future__ import annotations

from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    DDIMScheduler,
)
from tokenizers import pre_tokenizers
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5EncoderModel,
)

from checkpoints.parts import MODEL_MAX_LENGTH, autoencoder, t5_config, t5_tokenizer


def roberta_tokenizer() -> RobertaTokenizer:
    """RoBERTa's layout at tiny size: special tokens and characters."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return RobertaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=80)


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
        vae=autoencoder(in_channels=1, out_channels=1),
        text_encoder=ClapModel(ClapConfig(text_config=text, audio_config=sound, projection_dim=16)),
        text_encoder_2=T5EncoderModel(t5_config()),
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
