"""What the tiny checkpoints of several families have in common: tokenizers, a CLIP, an autoencoder."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTokenizer, GemmaTokenizer, T5Config, T5Tokenizer

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


def gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's layout at tiny size: letters, words, and words after a space, which begin with "▁"."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        left = word[0]
        for letter in word[1:]:
            merges[left, letter] = None
            left += letter
        merges["▁", word] = None
    letters = ["▁", *(chr(i) for i in range(ord("a"), ord("z") + 1))]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocabulary, merges=list(merges), add_bos_token=True, add_eos_token=False)


def clip_config(
    tokenizer: CLIPTokenizer, *, hidden_size: int = 16, num_hidden_layers: int = 2, **options: int
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MODEL_MAX_LENGTH,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def t5_config() -> T5Config:
    """A T5 encoder of width 32 for `t5_tokenizer`."""
    return T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)


def autoencoder(**options: Any) -> AutoencoderKL:
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
