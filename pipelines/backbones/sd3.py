"""Stable Diffusion 3 and 3.5: a rectified flow with a joint-attention transformer and three text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.predictions import Parametrization
from sublimate.pipelines.backbones.base import (
    Backbone,
    EntryPoint,
    Network,
    Pipeline,
    StockSampling,
    joint_entry_points,
    refuse_unknown,
)
from sublimate.pipelines.features import block_taps, tapped
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.negative_attention import NEGATIVE, STRENGTH, negative_arguments
from sublimate.pipelines.one_step import flow_at
from sublimate.pipelines.patches import patched_shape
from sublimate.pipelines.stock_few_steps import flow_sampling
from sublimate.pipelines.text_encoders import penultimate_states
from sublimate.pipelines.tokens import TokenSpan, concept_span, prompt_span, tokenize

T5_LENGTH = 256
"""T5 tokens per prompt, the stock pipeline's `max_sequence_length`."""


class StableDiffusion3(Backbone):
    """`StableDiffusion3Pipeline`.

    "text" is a sequence: the two CLIPs' tokens side by side, padded with zeros to T5's width, then T5's tokens.
    "text.pooled" is the two CLIPs' pooled embeddings. Keys and values of the joint attention see mixed states, so text
    enters where both are projected first.

    T5's limit is the prompt's; of a longer one than the CLIPs read, they read the beginning, as in the stock pipeline.
    Without T5 the limit is theirs. Where words are (`prompt_rows`, `find_concept`) is told of prompts alone that every
    part reads whole.
    """

    pipeline_classes = ("StableDiffusion3Pipeline",)
    network_attribute = "transformer"
    text_components = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_components = ("text_encoder_3",)
    guidance_scale = 7.0
    sampler = "euler"
    grid_spacing = "linspace"
    no_guidance: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}
    discriminator_taps = 4

    def parametrization(self, pipe: Pipeline) -> Parametrization:
        return Parametrization("flow")

    @staticmethod
    def call(
        network: Network, x_in: Tensor, t_net: Tensor, condition: Condition, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not {"text", "text.pooled"} <= condition.keys():
            raise ValueError("Stable Diffusion 3 needs a text condition: encode a prompt, '' for none.")
        refuse_unknown(condition, ("text", "text.pooled", NEGATIVE, STRENGTH), network)
        text, steering = condition["text"], None
        if (told := negative_arguments(network, condition)) is not None:
            # The negative prompt's tokens follow the prompt's.
            steering = {"tokens": text.shape[1], "strength": told["strength"]}
            text = torch.cat([text, told["negative"]], dim=1)
        # A joint block returns (text tokens, image tokens).
        with tapped(network, features, item=1) as taps:
            y = network(
                hidden_states=x_in,
                timestep=t_net,
                encoder_hidden_states=text,
                pooled_projections=condition["text.pooled"],
                joint_attention_kwargs=steering,
            ).sample
        return y, taps

    def latent_shape(
        self, pipe: Pipeline, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        return patched_shape(pipe, height, width)

    def encode_prompts(self, pipe: Pipeline, prompts: Sequence[str]) -> Condition:
        told = {"beginning": pipe.text_encoder_3 is not None}
        first, pooled_first = penultimate_states(pipe.tokenizer, pipe.text_encoder, prompts, **told)
        second, pooled_second = penultimate_states(pipe.tokenizer_2, pipe.text_encoder_2, prompts, **told)
        clip = torch.cat([first, second], dim=-1)
        width = pipe.transformer.config.joint_attention_dim
        if pipe.text_encoder_3 is None:
            t5 = clip.new_zeros(len(clip), T5_LENGTH, width)
        else:
            ids, _ = tokenize(pipe.tokenizer_3, prompts, T5_LENGTH)
            t5 = pipe.text_encoder_3(ids.to(pipe.text_encoder_3.device)).last_hidden_state
        clip = nn.functional.pad(clip, (0, width - clip.shape[-1]))
        text = torch.cat([clip, t5], dim=1)
        return Condition({"text": text, "text.pooled": torch.cat([pooled_first, pooled_second], dim=-1)})

    def one_step(self, pipe: Pipeline, t: float | None = None) -> StockSampling:
        scheduler, call = flow_at(pipe.scheduler, t)
        return StockSampling("StableDiffusion3Pipeline", scheduler, {**call, **self.no_guidance})

    def few_steps(self, pipe: Pipeline, few: FewSteps) -> StockSampling:
        scheduler, call = flow_sampling(pipe.scheduler, self.schedule(pipe), few)
        call |= {"guidance_scale": few.guidance_scale}
        return StockSampling("StableDiffusion3Pipeline", scheduler, call, few)

    def feature_taps(self, network: Network) -> tuple[str, ...]:
        return block_taps(network.transformer_blocks, self.discriminator_taps)

    def text_entry_points(self, pipe: Pipeline) -> list[EntryPoint]:
        return joint_entry_points(pipe.transformer)

    def prompt_rows(self, pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
        return tuple(prompt_span(tokenizer, prompt, n, offset=at) for tokenizer, n, at in _parts(pipe))

    def find_concept(self, pipe: Pipeline, prompt: str, concept: str) -> tuple[TokenSpan, ...]:
        return tuple(concept_span(tokenizer, prompt, concept, n, offset=at) for tokenizer, n, at in _parts(pipe))


def _parts(pipe: Pipeline) -> list[tuple[Any, int, int]]:
    """(tokenizer, rows, first row) of each part of the sequence; the two CLIPs share their rows."""
    clip = pipe.tokenizer.model_max_length
    parts = [(pipe.tokenizer, clip, 0)]
    return parts if pipe.text_encoder_3 is None else [*parts, (pipe.tokenizer_3, T5_LENGTH, clip)]
