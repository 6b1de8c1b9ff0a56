"""PixArt-alpha and PixArt-Sigma: a cross-attention transformer on patches of latents, with T5 and noise prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.backbones.base import Backbone, EntryPoint, Network, Pipeline, StockSampling, refuse_unknown
from sublimate.pipelines.captions import caption_concept, caption_entry_points, caption_rows, encoded_captions
from sublimate.pipelines.features import block_taps, tapped
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.negative_attention import MASK, NEGATIVE, STRENGTH, negative_arguments
from sublimate.pipelines.one_step import ddim_at
from sublimate.pipelines.patches import patched_shape
from sublimate.pipelines.published_students import published_defaults
from sublimate.pipelines.stock_few_steps import table_sampling
from sublimate.pipelines.tokens import TokenSpan

PIXELS = 8
"""Pixels per latent: networks that are told the size of their picture are told it in pixels."""


class PixArtAlpha(Backbone):
    """`PixArtAlphaPipeline` (Chen et al. 2023, arXiv 2310.00426).

    "text" holds T5's states and "text.mask" which of them are tokens. Prompts are read in lower case and trimmed, and
    otherwise as they are: the stock call's `clean_caption` is off, and so is its `use_resolution_binning`, which draws
    other sizes than those asked for and scales the picture. Text enters where T5's states are projected, before any
    cross-attention. The network for 1024 pixels is told the picture's height, width and their ratio.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("PixArtAlphaPipeline",)
    network_attribute = "transformer"
    text_components = ("text_encoder",)
    guidance_scale = 4.5
    no_guidance: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}
    discriminator_taps = 4

    text_length: ClassVar[int] = 120
    """T5 tokens per prompt, the stock call's `max_sequence_length`."""

    as_asked: ClassVar[Mapping[str, Any]] = {"clean_caption": False, "use_resolution_binning": False}
    """Options of the stock call that leave prompts and sizes as they are."""

    def published_defaults(self, pipe: Pipeline) -> dict[str, Any]:
        """Those of a consistency model, by its scheduler; no PixArt is told the guidance scale."""
        found = published_defaults(pipe.scheduler, self.schedule(pipe), told_guidance=False)
        return {**found, "call": {**found["call"], **self.as_asked}} if "call" in found else found

    @staticmethod
    def call(
        network: Network, x_in: Tensor, t_net: Tensor, condition: Condition, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        keys = ("text", "text.mask")
        if not set(keys) <= condition.keys():
            raise ValueError("PixArt needs a text condition: encode a prompt, '' for none.")
        refuse_unknown(condition, (*keys, NEGATIVE, MASK, STRENGTH), network)
        if (steering := negative_arguments(network, condition)) is not None:
            steering["negative"] = network.caption_projection(steering["negative"])
        with tapped(network, features) as taps:
            y = network(
                x_in,
                encoder_hidden_states=condition["text"],
                encoder_attention_mask=condition["text.mask"],
                timestep=t_net,
                added_cond_kwargs=_picture_size(network, x_in),
                cross_attention_kwargs=steering,
            ).sample
        # A network that also predicts its variance does so in the second half of the channels.
        return y[:, : x_in.shape[1]], taps

    def latent_shape(
        self, pipe: Pipeline, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        if pipe.transformer.use_additional_conditions and pipe.vae_scale_factor != PIXELS:
            raise ValueError(
                f"A PixArt that is told sizes has {PIXELS} pixels per latent, not {pipe.vae_scale_factor}: use the "
                "autoencoder that it was trained with."
            )
        return patched_shape(pipe, height, width)

    def encode_prompts(self, pipe: Pipeline, prompts: Sequence[str]) -> Condition:
        return encoded_captions(pipe, prompts, self.text_length)

    def one_step(self, pipe: Pipeline, t: float | None = None) -> StockSampling:
        call = {"num_inference_steps": 1, **self.no_guidance, **self.as_asked}
        return StockSampling(self.pipeline_classes[0], ddim_at(pipe.scheduler, t), call)

    def few_steps(self, pipe: Pipeline, few: FewSteps) -> StockSampling:
        scheduler, call = table_sampling(pipe.scheduler, self.schedule(pipe), few)
        call |= {"guidance_scale": few.guidance_scale, **self.as_asked}
        return StockSampling(self.pipeline_classes[0], scheduler, call, few)

    def feature_taps(self, network: Network) -> tuple[str, ...]:
        return block_taps(network.transformer_blocks, self.discriminator_taps)

    def text_entry_points(self, pipe: Pipeline) -> list[EntryPoint]:
        return caption_entry_points(pipe)

    def prompt_rows(self, pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
        return caption_rows(pipe, prompt, self.text_length)

    def find_concept(self, pipe: Pipeline, prompt: str, concept: str) -> tuple[TokenSpan, ...]:
        return caption_concept(pipe, prompt, concept, self.text_length)


class PixArtSigma(PixArtAlpha):
    """`PixArtSigmaPipeline` (Chen et al. 2024, arXiv 2403.04692): longer prompts, and no network is told sizes."""

    pipeline_classes: ClassVar[tuple[str, ...]] = ("PixArtSigmaPipeline",)
    text_length = 300


def _picture_size(network: Network, x_in: Tensor) -> dict[str, Tensor | None]:
    """Height and width in pixels (batch, 2) and their ratio (batch, 1), for the networks that are told them."""
    if not network.use_additional_conditions:
        return {"resolution": None, "aspect_ratio": None}
    height, width = (PIXELS * side for side in x_in.shape[2:])
    # Filled where they are needed: a copy from the CPU would wait for the GPU.
    size = torch.cat([x_in.new_full((len(x_in), 1), side) for side in (height, width)], 1)
    return {"resolution": size, "aspect_ratio": x_in.new_full((len(x_in), 1), height / width)}
