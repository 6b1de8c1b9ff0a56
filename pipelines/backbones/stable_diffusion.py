"""Stable Diffusion 1.x and 2.x: a cross-attention UNet on latents, with noise or v-prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.autoencoders import decode_latents, encode_images
from sublimate.pipelines.backbones.base import Backbone, EntryPoint, Network, OneStep, Pipeline, refuse_unknown
from sublimate.pipelines.features import tapped
from sublimate.pipelines.one_step import ddim_at
from sublimate.pipelines.tokens import TokenSpan, concept_span, prompt_span, tokenize


class StableDiffusion(Backbone):
    """`StableDiffusionPipeline`. Text enters through the keys and values of every cross-attention layer."""

    pipeline_classes = ("StableDiffusionPipeline",)
    network_attribute = "unet"
    text_components = ("text_encoder",)
    guidance_scale = 7.5
    no_guidance: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}

    @staticmethod
    def call(
        network: Network, x_in: Tensor, t_net: Tensor, condition: Condition, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if "text" not in condition:
            raise ValueError("Stable Diffusion needs a text condition: encode a prompt, '' for none.")
        # Latent consistency models are told the guidance scale; a player may have added the layer that reads it.
        projection = network.time_embedding.cond_proj
        refuse_unknown(condition, ("text",) if projection is None else ("text", "guidance"), network)
        embedding = None if projection is None else _guidance_embedding(condition, projection.in_features, x_in)
        with tapped(network, features) as taps:
            y = network(x_in, t_net, encoder_hidden_states=condition["text"], timestep_cond=embedding).sample
        return y, taps

    def latent_shape(
        self, pipe: Pipeline, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        size = pipe.unet.config.sample_size
        own = (size, size) if isinstance(size, int) else tuple(size)
        factor = pipe.vae_scale_factor
        for pixels in (height, width):
            if pixels is not None and (pixels <= 0 or pixels % factor):
                raise ValueError(f"Images must measure a multiple of {factor} pixels, not {pixels}.")
        return (
            pipe.unet.config.in_channels,
            own[0] if height is None else height // factor,
            own[1] if width is None else width // factor,
        )

    def encode_prompts(self, pipe: Pipeline, prompts: Sequence[str]) -> Condition:
        ids, mask = tokenize(pipe.tokenizer, prompts)
        encoder = pipe.text_encoder
        uses_mask = getattr(encoder.config, "use_attention_mask", False)
        states = encoder(ids.to(encoder.device), attention_mask=mask.to(encoder.device) if uses_mask else None)
        return Condition({"text": states.last_hidden_state})

    def null_condition(self, pipe: Pipeline) -> Condition:
        return self.encode_prompts(pipe, [""])

    def encode(self, pipe: Pipeline, images: Tensor) -> Tensor:
        return encode_images(pipe.vae, images)

    def decode(self, pipe: Pipeline, latents: Tensor) -> Tensor:
        return decode_latents(pipe.vae, latents)

    def one_step(self, pipe: Pipeline, t: float | None = None) -> OneStep:
        return OneStep(
            "StableDiffusionPipeline", ddim_at(pipe.scheduler, t), {"num_inference_steps": 1, **self.no_guidance}
        )

    def reads_guidance(self, network: Network) -> bool:
        return network.time_embedding.cond_proj is not None

    def feature_taps(self, network: Network) -> tuple[str, ...]:
        downs = tuple(f"down_blocks.{i}" for i in range(len(network.down_blocks)))
        ups = tuple(f"up_blocks.{i}" for i in range(len(network.up_blocks)))
        return ("mid_block", *downs, *ups)

    def text_entry_points(self, pipe: Pipeline) -> list[EntryPoint]:
        return [
            EntryPoint("unet", name, "text", slice(0, module.in_features), module.bias is not None)
            for name, module in pipe.unet.named_modules()
            if name.endswith(("attn2.to_k", "attn2.to_v"))
        ]

    def prompt_rows(self, pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
        return (prompt_span(pipe.tokenizer, prompt, pipe.tokenizer.model_max_length),)

    def find_concept(self, pipe: Pipeline, prompt: str, concept: str) -> tuple[TokenSpan, ...]:
        return (concept_span(pipe.tokenizer, prompt, concept, pipe.tokenizer.model_max_length),)


def _guidance_embedding(condition: Condition, width: int, x_in: Tensor) -> Tensor:
    """What a guidance-distilled UNet is told: sines and cosines of w = scale - 1, (batch, width).

    Meng et al. 2023, arXiv 2210.03142; w is multiplied by 1000 as in latent consistency models. The scale is 1, no
    guidance, unless the condition says otherwise.
    """
    scale = condition["guidance"] if "guidance" in condition else torch.ones(len(x_in), device=x_in.device)
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=x_in.device) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (scale.float() - 1)[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return nn.functional.pad(embedding, (0, width % 2)).to(x_in.dtype)
