"""Folders as diffusers 0.30 and transformers 4.44 wrote them, made of folders of today."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig

NEWER_KEYS = {
    "FlowMatchEulerDiscreteScheduler": (
        "invert_sigmas",
        "shift_terminal",
        "stochastic_sampling",
        "time_shift_type",
        "use_beta_sigmas",
        "use_exponential_sigmas",
        "use_karras_sigmas",
    ),
    "EulerDiscreteScheduler": ("use_beta_sigmas", "use_exponential_sigmas"),
    "FluxTransformer2DModel": ("out_channels",),
    "SD3Transformer2DModel": ("dual_attention_layers", "qk_norm"),
    "AutoencoderKL": ("mid_block_add_attention",),
}
"""What configurations have come to say since."""

OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""The names of an autoencoder's attention before diffusers 0.17, in which Stable Diffusion 1.5 is still published."""

PNDM = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.30.3",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
"""The scheduler that Stable Diffusion 1.x is published with."""


def as_of_0_30(folder: Path) -> Path:
    """Rewrites a folder in place; its weights keep their values."""
    index = _read(folder / "model_index.json")
    index |= {"_diffusers_version": "0.30.3", "_name_or_path": "somewhere/else"}
    if index["_class_name"] == "StableDiffusionPipeline":
        _write(folder / "scheduler" / "scheduler_config.json", PNDM)
        index["scheduler"] = ["diffusers", "PNDMScheduler"]
    _write(folder / "model_index.json", index)
    for component in (path for path in folder.iterdir() if path.is_dir()):
        if component.name.startswith("tokenizer"):
            _slow_tokenizer(component)
        elif component.name.startswith("text_encoder"):
            _transformers_4(component)
        for config in component.glob("*config.json"):
            _older_config(config)
    _old_attention(folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


def add_safety_checker(folder: Path, *, alarmed: bool = False) -> Path:
    """Adds a safety checker and its extractor, as transformers 4 wrote them, to a Stable Diffusion folder.

    Args:
        folder: changed in place.
        alarmed: it finds every picture unsafe, so that the stock pipeline blackens it; otherwise none.
    """
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    words = {"vocab_size": 8, "bos_token_id": 6, "eos_token_id": 7, "max_position_embeddings": 4}
    config = CLIPConfig(
        text_config={**tower, **words},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2.0 if alarmed else 2.0)  # thresholds of a cosine
    checker.special_care_embeds_weights.data.fill_(2.0)
    checker.save_pretrained(folder / "safety_checker")
    extractor = {
        "crop_size": {"height": 16, "width": 16},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 16},
    }
    (folder / "feature_extractor").mkdir()
    _write(folder / "feature_extractor" / "preprocessor_config.json", extractor)
    index = _read(folder / "model_index.json")
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = True
    _write(folder / "model_index.json", index)
    return folder


def _older_config(path: Path) -> None:
    config = _read(path)
    for key in NEWER_KEYS.get(config.get("_class_name", ""), ()):
        config.pop(key, None)
    if "_diffusers_version" in config:
        config |= {"_diffusers_version": "0.30.3", "_name_or_path": "somewhere/else"}
    _write(path, config)


def _transformers_4(folder: Path) -> None:
    """A text encoder with the wrapper around CLIP's text model, and the configuration's names of that time."""
    config = _read(folder / "config.json")
    config |= {"torch_dtype": config.pop("dtype"), "transformers_version": "4.44.2"}
    _write(folder / "config.json", config)
    file = folder / "model.safetensors"
    weights = load_file(file)
    if config["architectures"] == ["CLIPTextModel"]:
        weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in weights.items()}
    save_file(weights, file, {"format": "pt"})


def _slow_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer as a vocabulary and its merges."""
    model = _read(folder / "tokenizer.json")["model"]
    if model["type"] != "BPE":
        return
    merges = (" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer.json").unlink()
    length = _read(folder / "tokenizer_config.json")["model_max_length"]
    start, end = (
        {"content": token, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
        for token, normalized in (("<|startoftext|>", True), ("<|endoftext|>", False))
    )
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(model["vocab"][token["content"]]): {**token, "special": True} for token in (start, end)
        },
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": length,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    }
    _write(folder / "tokenizer_config.json", settings)
    special = {"bos_token": start, "eos_token": end, "pad_token": "<|endoftext|>", "unk_token": end}
    _write(folder / "special_tokens_map.json", special)


def _old_attention(file: Path) -> None:
    weights = {}
    for name, value in load_file(file).items():
        for today, before in OLD_ATTENTION.items():
            name = name.replace(f".{today}.", f".{before}.")
        weights[name] = value
    save_file(weights, file, {"format": "pt"})


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
