"""Ink's teacher: a small Stable Diffusion whose text encoder and UNet train together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.predictions import Parametrization
from sublimate.diffusion.schedules import from_scheduler
from sublimate.pipelines.cards import model_card
from sublimate.pipelines.folders import written_aside
from sublimate.pipelines.locations import DEFAULTS_FILE

LATENT_SHAPE = (4, 8, 8)
WIDTH = 128
GUIDANCE_SCALE, STEPS = 3.0, 25


def make_autoencoder() -> AutoencoderKL:
    """The untrained autoencoder, 32x32x3 <-> 8x8x4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_SHAPE[0],
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The untrained text encoder over Ink's own vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    """The untrained UNet, about 4.3 M parameters."""
    return UNet2DConditionModel(
        sample_size=LATENT_SHAPE[-1],
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        block_out_channels=(80, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v-prediction: one step from pure noise is then well conditioned."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        steps_offset=1,
    )


class Captioned(nn.Module):
    """UNet and text encoder as one network that is told token ids."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x_t, t, encoder_hidden_states=self.text_encoder(ids).last_hidden_state).sample


class UntrainedTeacher:
    """The untrained teacher as a `Denoising` objective sees it: the text condition is token ids."""

    latent_shape = LATENT_SHAPE

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.tokenizer = tokenizer
        network = Captioned(make_unet(), make_text_encoder(tokenizer))
        schedule = from_scheduler(make_scheduler(), LATENT_SHAPE)
        self.denoiser = Denoiser(network, _call, schedule, Parametrization("v_prediction"))

    def null_condition(self) -> Condition:
        return self.encode_prompts([""])

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Token ids, (batch, model_max_length)."""
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return Condition({"text": ids})


def _call(
    network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, features: object
) -> tuple[Tensor, dict[str, Tensor]]:
    return network(x_t, t, condition["text"]), {}


def save_teacher(
    network: Captioned, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path, provenance: dict[str, Any]
) -> None:
    """Writes the stock pipeline: UNet and autoencoder in fp16, the text encoder in fp32.

    transformers 5 keeps the precision of a file while diffusers converts to the one asked for, so a text encoder
    stored in fp16 would not fit a UNet loaded in fp32.

    Args:
        network: trained.
        autoencoder: trained, with its `scaling_factor` registered.
        tokenizer: Ink's.
        folder: where to; an earlier teacher there is replaced once the new one is complete.
        provenance: how it was trained; JSON values, for the model card.
    """
    pipeline = StableDiffusionPipeline(
        vae=autoencoder.to(torch.float16),
        text_encoder=network.text_encoder.float(),
        tokenizer=tokenizer,
        unet=network.unet.to(torch.float16),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    card = model_card(
        title="Ink's teacher",
        kind="weights",
        summary="A small text-to-image model of handwritten digits in six inks and four styles, 32x32 pixels.",
        usage="from diffusers import DiffusionPipeline\n\n"
        'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")\n'
        f'image = pipeline("a neon seven in red", guidance_scale={GUIDANCE_SCALE}).images[0]',
        base="none, trained from scratch",
        provenance=provenance,
        license="apache-2.0",
    )
    record = {"kind": "weights", "guidance_scale": GUIDANCE_SCALE, "steps": STEPS, "provenance": provenance}
    with written_aside(folder, "model_index.json") as aside:
        pipeline.save_pretrained(aside)
        (aside / DEFAULTS_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
        (aside / "README.md").write_text(card)
