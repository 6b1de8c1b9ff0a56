"""Checkpoints as one file with the names of the original code, as they circulate beside diffusers' folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = {
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "self_attn": "attn",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
}


def save_single_file(pipeline: Any, path: Path) -> Path:
    """A Stable Diffusion pipeline, 1.x or XL, as one file."""
    state = {f"model.diffusion_model.{name}": value for name, value in _unet(pipeline.unet).items()}
    state |= {f"first_stage_model.{name}": value for name, value in _vae(pipeline.vae).items()}
    second = getattr(pipeline, "text_encoder_2", None)
    first = "cond_stage_model.transformer" if second is None else "conditioner.embedders.0.transformer"
    clip = {name.removeprefix("text_model."): value for name, value in pipeline.text_encoder.state_dict().items()}
    state |= {f"{first}.text_model.{name}": value for name, value in clip.items()}
    if second is not None:
        state |= {f"conditioner.embedders.1.model.{name}": value for name, value in _open_clip(second).items()}
    save_file({name: value.contiguous().clone() for name, value in state.items()}, path)
    return path


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def _unet(unet: Any) -> dict[str, Tensor]:
    layers = unet.config.layers_per_block
    found = {}
    for name, value in unet.state_dict().items():
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
            way, block, kind, layer, rest = match.groups()
            # The way down starts with conv_in, and each block ends with its downsampler; the way up is a layer longer.
            place = int(block) * (layers + 1) + int(layer) + (way == "down")
            rest = _renamed(rest, _RESNET) if kind == "resnets" else rest
            name = f"{'input' if way == 'down' else 'output'}_blocks.{place}.{int(kind == 'attentions')}.{rest}"
        elif match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
            name = f"input_blocks.{int(match[1]) * (layers + 1) + layers + 1}.0.op.{match[2]}"
        elif match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", name):
            after = 1 + hasattr(unet.up_blocks[int(match[1])], "attentions")
            name = f"output_blocks.{int(match[1]) * (layers + 1) + layers}.{after}.conv.{match[2]}"
        elif match := re.match(r"mid_block\.resnets\.(\d)\.(.*)", name):
            name = f"middle_block.{2 * int(match[1])}.{_renamed(match[2], _RESNET)}"
        else:
            name = _renamed(name.replace("mid_block.attentions.0", "middle_block.1"), _UNET)
        found[name] = value
    return found


def _vae(vae: Any) -> dict[str, Tensor]:
    last = len(vae.config.up_block_types) - 1
    found = {}
    for name, value in vae.state_dict().items():
        attention = "attentions" in name and value.ndim == 2
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", name)
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
        name = re.sub(r"((?:up|down)\.\d+)\.resnets", r"\1.block", name)
        found[_renamed(name, _VAE)] = value[:, :, None, None] if attention else value
    return found


def _open_clip(encoder: Any) -> dict[str, Tensor]:
    found = {}
    state = encoder.state_dict()
    for name, value in state.items():
        if name == "text_projection.weight":
            found["text_projection"] = value.T
        elif match := re.search(r"(.*self_attn)\.q_proj\.(weight|bias)", name):
            three = [state[f"{match[1]}.{kind}_proj.{match[2]}"] for kind in "qkv"]
            name = _renamed(match[1].removeprefix("text_model."), _OPEN_CLIP)
            found[f"{name}.in_proj_{match[2]}"] = torch.cat(three)
        elif not re.search(r"self_attn\.[kv]_proj", name):
            found[_renamed(name.removeprefix("text_model."), _OPEN_CLIP)] = value
    return found
