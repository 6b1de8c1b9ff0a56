"""Sana: a rectified flow with a linear-attention transformer, a Gemma text encoder and a deep autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.predictions import Parametrization
from sublimate.pipelines.backbones.base import Backbone, EntryPoint, Network, Pipeline, StockSampling, refuse_unknown
from sublimate.pipelines.captions import caption_concept, caption_entry_points, caption_rows, encoded_captions
from sublimate.pipelines.features import block_taps, tapped
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.one_step import flow_at
from sublimate.pipelines.patches import patched_shape
from sublimate.pipelines.stock_few_steps import flow_sampling
from sublimate.pipelines.tokens import TokenSpan

TEXT_LENGTH = 300
"""Gemma's tokens per prompt, the stock call's `max_sequence_length`."""


class Sana(Backbone):
    """`SanaPipeline` (Xie et al. 2024, arXiv 2410.10629).

    "text" holds Gemma's states and "text.mask" which of them are tokens. Prompts are read in lower case and trimmed,
    and otherwise as they are: of the stock call's options, `complex_human_instruction` (a preamble that asks Gemma for
    a richer description) is None, and `clean_caption` and `use_resolution_binning` (which draws other sizes than those
    asked for, and scales the picture) are off. Text enters where Gemma's states are projected, before any
    cross-attention. Self-attention is linear and has no softmax.
    """

    pipeline_classes = ("SanaPipeline",)
    network_attribute = "transformer"
    text_components = ("text_encoder",)
    guidance_scale = 4.5
    sampler = "euler"
    no_guidance: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}
    discriminator_taps = 4

    def parametrization(self, pipe: Pipeline) -> Parametrization:
        return Parametrization("flow")

    @staticmethod
    def call(
        network: Network, x_in: Tensor, t_net: Tensor, condition: Condition, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        keys = ("text", "text.mask")
        if not set(keys) <= condition.keys():
            raise ValueError("Sana needs a text condition: encode a prompt, '' for none.")
        refuse_unknown(condition, keys, network)
        with tapped(network, features) as taps:
            y = network(
                x_in,
                encoder_hidden_states=condition["text"],
                encoder_attention_mask=condition["text.mask"],
                timestep=network.config.timestep_scale * t_net,
            ).sample
        # A network that also predicts its variance does so in the second half of the channels.
        return y[:, : x_in.shape[1]], taps

    def latent_shape(
        self, pipe: Pipeline, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        return patched_shape(pipe, height, width)

    def encode_prompts(self, pipe: Pipeline, prompts: Sequence[str]) -> Condition:
        return encoded_captions(pipe, prompts, TEXT_LENGTH)

    def encode_prefixes(self, pipe: Pipeline, prompts: Sequence[str], rows: int) -> Condition:
        """Gemma is causal: of each prompt `rows` tokens do."""
        return encoded_captions(pipe, prompts, TEXT_LENGTH, rows)

    def one_step(self, pipe: Pipeline, t: float | None = None) -> StockSampling:
        scheduler, call = flow_at(pipe.scheduler, t)
        return StockSampling("SanaPipeline", scheduler, {**call, **self.no_guidance, **self._as_asked(pipe)})

    def few_steps(self, pipe: Pipeline, few: FewSteps) -> StockSampling:
        scheduler, call = flow_sampling(pipe.scheduler, self.schedule(pipe), few)
        call |= {"guidance_scale": few.guidance_scale, **self._as_asked(pipe)}
        return StockSampling("SanaPipeline", scheduler, call, few)

    def _as_asked(self, pipe: Pipeline) -> dict[str, Any]:
        """Options of the stock call that leave prompts as they are and draw the checkpoint's own size."""
        _, height, width = (pipe.vae_scale_factor * side for side in self.latent_shape(pipe))
        return {
            "height": height,
            "width": width,
            "clean_caption": False,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
        }

    def feature_taps(self, network: Network) -> tuple[str, ...]:
        return block_taps(network.transformer_blocks, self.discriminator_taps)

    def text_entry_points(self, pipe: Pipeline) -> list[EntryPoint]:
        return caption_entry_points(pipe)

    def prompt_rows(self, pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
        return caption_rows(pipe, prompt, TEXT_LENGTH)

    def find_concept(self, pipe: Pipeline, prompt: str, concept: str) -> tuple[TokenSpan, ...]:
        return caption_concept(pipe, prompt, concept, TEXT_LENGTH)
