"""Stable Diffusion XL: a cross-attention UNet that is also told a pooled embedding of the text, and sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.autoencoders import decode_latents, encode_images, exact
from sublimate.pipelines.backbones.base import EntryPoint, Network, Pipeline
from sublimate.pipelines.backbones.stable_diffusion import StableDiffusion, call_unet
from sublimate.pipelines.text_encoders import penultimate_states

POOLED, TIME_IDS = "text.pooled", "extra.time_ids"


class StableDiffusionXL(StableDiffusion):
    """`StableDiffusionXLPipeline` (Podell et al. 2023, arXiv 2307.01952).

    "text" is the two encoders' tokens side by side, each as it is before its encoder's last layer. "text.pooled" is
    the second one's pooled state; it enters beside six embedded numbers, "extra.time_ids" (batch, 6): the height and
    width of the training image, the top and left of its crop, and the height and width that are drawn, in pixels.
    """

    pipeline_classes = ("StableDiffusionXLPipeline",)
    text_components = ("text_encoder", "text_encoder_2")
    guidance_scale = 5.0
    told_crops = True
    told_besides = "text_time"

    @staticmethod
    def call(
        network: Network, x_in: Tensor, t_net: Tensor, condition: Condition, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not {"text", POOLED, TIME_IDS} <= condition.keys():
            raise ValueError(
                f"Stable Diffusion XL needs a text condition and {TIME_IDS!r}: encode a prompt, '' for none."
            )
        rest = Condition({key: value for key, value in condition.items() if key not in (POOLED, TIME_IDS)})
        told = {"text_embeds": condition[POOLED], "time_ids": condition[TIME_IDS]}
        return call_unet(network, x_in, t_net, rest, features, added_cond_kwargs=told)

    def encode_prompts(self, pipe: Pipeline, prompts: Sequence[str]) -> Condition:
        first, _ = penultimate_states(pipe.tokenizer, pipe.text_encoder, prompts)
        second, pooled = penultimate_states(pipe.tokenizer_2, pipe.text_encoder_2, prompts)
        text = Condition({"text": torch.cat([first, second], dim=-1), POOLED: pooled})
        return text.replace(**self.sizes(pipe).expand(len(prompts)))

    def encode_prefixes(self, pipe: Pipeline, prompts: Sequence[str], rows: int) -> Condition:
        """Of all tokens: the pooled state is that of the end token."""
        return self.encode_prompts(pipe, prompts)

    def null_condition(self, pipe: Pipeline) -> Condition:
        """The empty prompt, or zeros where the checkpoint says `force_zeros_for_empty_prompt`."""
        null = self.encode_prompts(pipe, [""])
        if not pipe.config.force_zeros_for_empty_prompt:
            return null
        return null.replace(**{key: torch.zeros_like(null[key]) for key in null.text_keys})

    def sizes(self, pipe: Pipeline, height: int | None = None, width: int | None = None) -> Condition:
        """As the stock pipeline has it by default: a training image of the size that is drawn, not cropped."""
        _, rows, columns = self.latent_shape(pipe, height, width)
        size = (rows * pipe.vae_scale_factor, columns * pipe.vae_scale_factor)
        ids = torch.tensor([[*size, 0, 0, *size]], device=pipe.unet.device, dtype=pipe.text_encoder_2.dtype)
        return Condition({TIME_IDS: ids})

    def encode(self, pipe: Pipeline, images: Tensor) -> Tensor:
        return encode_images(exact(pipe.vae), images).to(pipe.vae.dtype)

    def decode(self, pipe: Pipeline, latents: Tensor) -> Tensor:
        return decode_latents(exact(pipe.vae), latents).to(pipe.vae.dtype)

    def text_entry_points(self, pipe: Pipeline) -> list[EntryPoint]:
        """Keys and values, and the pooled state's columns, which come before those of the embedded numbers."""
        layer = pipe.unet.add_embedding.linear_1
        columns = slice(0, pipe.text_encoder_2.config.projection_dim)
        pooled = EntryPoint("unet", "add_embedding.linear_1", POOLED, columns, layer.bias is not None)
        return [*super().text_entry_points(pipe), pooled]
