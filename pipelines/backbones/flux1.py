"""FLUX.1: a rectified flow with a joint-attention transformer on packed latents, and two text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from sublimate.pipelines.features import spread, tapped
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.negative_attention import NEGATIVE, STRENGTH, negative_arguments
from sublimate.pipelines.one_step import flow_at
from sublimate.pipelines.stock_few_steps import flow_sampling
from sublimate.pipelines.tokens import TokenSpan, concept_span, prompt_span, tokenize

DEV_LENGTH, SCHNELL_LENGTH = 512, 256
"""T5 tokens per prompt, unless the tokenizer's limit is lower; the first is the stock call's default."""


class Flux1(Backbone):
    """`FluxPipeline`: FLUX.1 [dev], which is told the guidance scale, and FLUX.1 [schnell], which is not.

    "text" is T5's sequence and "text.pooled" CLIP's summary of the prompt. T5's limit is the prompt's; of a longer
    one than CLIP reads, its summary is of the beginning, as in the stock pipeline. Keys and values see mixed states,
    so text enters where both are projected first.

    x_t is the unpacked latent; the network sees its 2x2 patches. A network that is told the guidance scale is told 1
    unless the condition's "guidance" says otherwise, and 1 + s where a jump shall end at "target_time" s: to one that
    is told nothing it ends at clean data.
    """

    pipeline_classes = ("FluxPipeline",)
    network_attribute = "transformer"
    text_components = ("text_encoder", "text_encoder_2")
    guidance_scale = 3.5
    sampler = "euler"
    no_guidance: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}
    discriminator_taps = 4

    def published_defaults(self, pipe: Pipeline) -> dict[str, Any]:
        """Schnell is a student of four of Euler's steps without guidance."""
        if self.reads_guidance(pipe.transformer):
            return {}
        few = FewSteps("target_driven", steps=4, eta=0.0)
        return {"guidance_scale": few.guidance_scale, "steps": few.steps, "few_steps": few.to_dict()}

    def parametrization(self, pipe: Pipeline) -> Parametrization:
        return Parametrization("flow")

    @staticmethod
    def call(
        network: Network, x_in: Tensor, t_net: Tensor, condition: Condition, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not {"text", "text.pooled"} <= condition.keys():
            raise ValueError("FLUX.1 needs a text condition: encode a prompt, '' for none.")
        numbers = ("guidance", "target_time") if network.config.guidance_embeds else ()
        refuse_unknown(condition, ("text", "text.pooled", NEGATIVE, STRENGTH, *numbers), network)
        text, steering = condition["text"], None
        if (told := negative_arguments(network, condition)) is not None:
            # The negative prompt's tokens follow the prompt's.
            tokens, text = text.shape[1], torch.cat([text, told["negative"]], dim=1)
            steering = {"tokens": tokens, "text": text.shape[1], "strength": told["strength"]}
        height, width = x_in.shape[-2:]
        # As the stock pipeline rounds it; the network multiplies by 1000.
        t = t_net.to(x_in.dtype) / 1000
        number = _number(condition, x_in) if numbers else None
        # Double and single blocks alike return (text tokens, image tokens).
        with tapped(network, features, item=1) as taps, _unrounded(network, t, number):
            y = network(
                hidden_states=packed(x_in),
                timestep=t,
                guidance=number,
                encoder_hidden_states=text,
                pooled_projections=condition["text.pooled"],
                txt_ids=torch.zeros(text.shape[1], 3, device=x_in.device, dtype=x_in.dtype),
                img_ids=_positions(height // 2, width // 2, x_in),
                joint_attention_kwargs=steering,
            ).sample
        return unpacked(y, height, width), taps

    def latent_shape(
        self, pipe: Pipeline, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """The own size is the autoencoder's, which of the published checkpoints is the stock pipeline's default."""
        factor, own = pipe.vae_scale_factor, pipe.vae.config.sample_size
        for pixels in (height, width):
            if pixels is not None and (pixels <= 0 or pixels % (2 * factor)):
                raise ValueError(f"Images must measure a multiple of {2 * factor} pixels, not {pixels}.")
        return (
            pipe.transformer.config.in_channels // 4,
            (own if height is None else height) // factor,
            (own if width is None else width) // factor,
        )

    def encode_prompts(self, pipe: Pipeline, prompts: Sequence[str]) -> Condition:
        ids, _ = tokenize(pipe.tokenizer_2, prompts, _length(pipe))
        text = pipe.text_encoder_2(ids.to(pipe.text_encoder_2.device)).last_hidden_state
        start, _ = tokenize(pipe.tokenizer, prompts, beginning=True)
        pooled = pipe.text_encoder(start.to(pipe.text_encoder.device)).pooler_output
        return Condition({"text": text, "text.pooled": pooled})

    def one_step(self, pipe: Pipeline, t: float | None = None) -> StockSampling:
        scheduler, call = flow_at(pipe.scheduler, t)
        return StockSampling("FluxPipeline", scheduler, {**call, **self.no_guidance, **self._sizes(pipe)})

    def few_steps(self, pipe: Pipeline, few: FewSteps) -> StockSampling:
        if few.guidance_scale != 1 and (few.sampler == "trajectory" or not self.reads_guidance(pipe.transformer)):
            raise ValueError("No fixed call of FluxPipeline guides a network by two passes: set guidance_scale to 1.")
        scheduler, call = flow_sampling(pipe.scheduler, self.schedule(pipe), few)
        call |= {"guidance_scale": few.guidance_scale, **self._sizes(pipe)}
        return StockSampling("FluxPipeline", scheduler, call, few)

    def _sizes(self, pipe: Pipeline) -> dict[str, int]:
        """What the stock call must be told because its defaults are FLUX.1 [dev]'s at 1024x1024."""
        sizes, length = {}, _length(pipe)
        if length != DEV_LENGTH:
            sizes["max_sequence_length"] = length
        _, height, width = self.latent_shape(pipe)
        for name, own in (("height", height), ("width", width)):
            if own != pipe.default_sample_size:
                sizes[name] = own * pipe.vae_scale_factor
        return sizes

    def reads_guidance(self, network: Network) -> bool:
        return network.config.guidance_embeds

    def with_number_input(self, network: Network) -> Network:
        """A network that is told the guidance scale, which no layer is added for; its answer depends on that."""
        return network if self.reads_guidance(network) else super().with_number_input(network)

    def feature_taps(self, network: Network) -> tuple[str, ...]:
        doubles = [f"transformer_blocks.{i}" for i in range(len(network.transformer_blocks))]
        singles = [f"single_transformer_blocks.{i}" for i in range(len(network.single_transformer_blocks))]
        return spread([*doubles, *singles], self.discriminator_taps)

    def text_entry_points(self, pipe: Pipeline) -> list[EntryPoint]:
        return joint_entry_points(pipe.transformer)

    def prompt_rows(self, pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
        return (prompt_span(pipe.tokenizer_2, prompt, _length(pipe)),)

    def find_concept(self, pipe: Pipeline, prompt: str, concept: str) -> tuple[TokenSpan, ...]:
        return (concept_span(pipe.tokenizer_2, prompt, concept, _length(pipe)),)


def packed(latents: Tensor) -> Tensor:
    """(batch, channels, height, width) -> the tokens of its 2x2 patches, (batch, height/2 * width/2, 4 channels).

    Raises:
        ValueError: for an odd height or width.
    """
    size = tuple(latents.shape[-2:])
    if size[0] % 2 or size[1] % 2:
        raise ValueError(f"FLUX.1 packs latents in 2x2 patches: give x_t of even height and width, not {size}.")
    patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`, for latents of this height and width."""
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _positions(rows: int, columns: int, like: Tensor) -> Tensor:
    """(0, row, column) of each patch, (rows * columns, 3), where another tensor is and in its precision."""
    sides = (torch.arange(side, device=like.device) for side in (rows, columns))
    row, column = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).to(like)


@contextmanager
def _unrounded(network: Network, t: Tensor, number: Tensor | None) -> Iterator[None]:
    """Within this context the network embeds these numbers as they are, in the precision that they have.

    It rounds them to that of its first layer's output, which under bf16 autocast is coarser than the distance between
    neighbouring times of a grid.
    """

    def exact(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        numbers = (t,) if number is None else (t, number.to(t.dtype))
        return (*(value * 1000 for value in numbers), arguments[-1])

    handle = network.time_text_embed.register_forward_pre_hook(exact)
    try:
        yield
    finally:
        handle.remove()


def _number(condition: Condition, x_in: Tensor) -> Tensor:
    """What a network with an input for the guidance scale is told, (batch,) float32."""
    if "target_time" in condition:
        if "guidance" in condition:
            raise ValueError("FLUX.1 has one such input: tell it the guidance scale or a target time, not both.")
        return 1 + condition["target_time"].float()
    return condition["guidance"].float() if "guidance" in condition else torch.ones(len(x_in), device=x_in.device)


def _length(pipe: Pipeline) -> int:
    """T5 tokens per prompt."""
    length = DEV_LENGTH if pipe.transformer.config.guidance_embeds else SCHNELL_LENGTH
    return min(pipe.tokenizer_2.model_max_length, length)
