"""Tiny checkpoints of networks that see images, saved as the hub has them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

LETTERS = "abcdefghijklmnopqrstuvwxyz,"
TOKENS = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SEES = {"image_size": 16, "patch_size": 8}


def vit(folder: Path) -> Path:
    """A classifier of 16 x 16 images, without the pooler that the bare network has."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**TOWER, **SEES, id2label={0: "crane", 1: "dog", 2: "crane"}))
    model.classifier.weight.data.mul_(20)  # decided answers, so that a threshold has something to cut
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def dinov2(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {name: value for name, value in TOWER.items() if name != "intermediate_size"}
    Dinov2Model(Dinov2Config(**sizes, **SEES)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def clip(folder: Path) -> Path:
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": len(TOKENS), "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config={**TOWER, **SEES}, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=16).save_pretrained(folder)
    CLIPTokenizer(vocab={token: index for index, token in enumerate(TOKENS)}, merges=[]).save_pretrained(folder)
    return folder


def siglip() -> SiglipModel:
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": len(TOKENS), "max_position_embeddings": 24}
    return SiglipModel(SiglipConfig(text_config=text, vision_config={**TOWER, **SEES}))


def convnext(folder: Path) -> Path:
    torch.manual_seed(0)
    ConvNextModel(ConvNextConfig(hidden_sizes=[4, 6], depths=[1, 1], num_stages=2)).save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder
