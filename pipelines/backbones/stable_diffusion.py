"""Stable Diffusion 1.x and 2.x: a cross-attention UNet on latents, with noise or v-prediction."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.backbones.base import Backbone, EntryPoint, Network, Pipeline, StockSampling, refuse_unknown
from sublimate.pipelines.features import tapped, unet_taps
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.negative_attention import NEGATIVE, STRENGTH, negative_arguments
from sublimate.pipelines.one_step import ddim_at
from sublimate.pipelines.published_students import published_defaults
from sublimate.pipelines.stock_few_steps import table_sampling
from sublimate.pipelines.tokens import TokenSpan, concept_span, prompt_span, tokenize

NUMBER_WIDTH = 256
"""Width of the embedded number, as in latent consistency models (Luo et al. 2023, arXiv 2310.04378)."""


class StableDiffusion(Backbone):
    """`StableDiffusionPipeline`. Text enters through the keys and values of every cross-attention layer.

    `LatentConsistencyModelPipeline` is the same with a UNet that is told the guidance scale and `LCMScheduler`.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    network_attribute = "unet"
    text_components: ClassVar[tuple[str, ...]] = ("text_encoder",)
    guidance_scale = 7.5
    told_besides: ClassVar[str | None] = None
    """What its UNet is told beside time and text, as diffusers calls it."""
    no_guidance: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}

    def published_defaults(self, pipe: Pipeline) -> dict[str, Any]:
        return published_defaults(pipe.scheduler, self.schedule(pipe), told_guidance=self.reads_guidance(pipe.unet))

    def check(self, pipe: Pipeline) -> None:
        super().check(pipe)
        config = pipe.unet.config
        widths = [getattr(pipe, name).config.hidden_size for name in self.text_components]
        read = config.encoder_hid_dim or config.cross_attention_dim
        if config.addition_embed_type != self.told_besides or (isinstance(read, int) and read != sum(widths)):
            raise ValueError(
                f"The UNet of this {type(pipe).__name__} reads text of width {read} and is told "
                f"{config.addition_embed_type or 'nothing'} besides, for {sum(widths)} and "
                f"{self.told_besides or 'nothing'}: parts of different families are in one checkpoint."
            )

    @staticmethod
    def call(
        network: Network, x_in: Tensor, t_net: Tensor, condition: Condition, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return call_unet(network, x_in, t_net, condition, features)

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
            pipe.unet.config.out_channels,
            own[0] if height is None else height // factor,
            own[1] if width is None else width // factor,
        )

    def encode_prompts(self, pipe: Pipeline, prompts: Sequence[str]) -> Condition:
        return self.encode_prefixes(pipe, prompts, pipe.tokenizer.model_max_length)

    def encode_prefixes(self, pipe: Pipeline, prompts: Sequence[str], rows: int) -> Condition:
        """CLIP's text encoder is causal, with and without a mask of the padding: of each prompt `rows` tokens do."""
        ids, mask = (tensor[:, :rows] for tensor in tokenize(pipe.tokenizer, prompts))
        encoder = pipe.text_encoder
        uses_mask = getattr(encoder.config, "use_attention_mask", False)
        states = encoder(ids.to(encoder.device), attention_mask=mask.to(encoder.device) if uses_mask else None)
        return Condition({"text": states.last_hidden_state})

    def one_step(self, pipe: Pipeline, t: float | None = None) -> StockSampling:
        return StockSampling(
            self.pipeline_classes[0], ddim_at(pipe.scheduler, t), {"num_inference_steps": 1, **self.no_guidance}
        )

    def few_steps(self, pipe: Pipeline, few: FewSteps) -> StockSampling:
        scheduler, call = table_sampling(pipe.scheduler, self.schedule(pipe), few)
        return StockSampling(self.pipeline_classes[0], scheduler, {**call, "guidance_scale": few.guidance_scale}, few)

    def reads_guidance(self, network: Network) -> bool:
        return network.time_embedding.cond_proj is not None

    def with_number_input(self, network: Network) -> Network:
        if self.reads_guidance(network):
            return network
        twin = copy.deepcopy(network, {id(p): p for p in (*network.parameters(), *network.buffers())})
        embedding = twin.time_embedding
        projection = nn.Linear(NUMBER_WIDTH, embedding.linear_1.in_features, bias=False)
        nn.init.zeros_(projection.weight)
        embedding.cond_proj = projection.to(embedding.linear_1.weight)
        twin.register_to_config(time_cond_proj_dim=NUMBER_WIDTH)
        return twin

    def feature_taps(self, network: Network) -> tuple[str, ...]:
        return unet_taps(network)

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


def call_unet(
    network: Network,
    x_in: Tensor,
    t_net: Tensor,
    condition: Condition,
    features: Sequence[str],
    shown: Sequence[Tensor] = (),
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs a UNet with cross-attention to text, as in `Backbone.call`.

    Args:
        network: the UNet.
        x_in, t_net, condition, features: as in `Backbone.call`.
        shown: what else it sees beside x_in, as further channels.
        options: further arguments of its call.

    Raises:
        ValueError: when the condition has no text or an entry that cannot be used, or what is shown differs in size.
    """
    if "text" not in condition:
        raise ValueError("Stable Diffusion needs a text condition: encode a prompt, '' for none.")
    if odd := [tuple(picture.shape[2:]) for picture in shown if picture.shape[2:] != x_in.shape[2:]]:
        raise ValueError(
            f"The network is shown a picture of {odd[0]} beside x_t of {tuple(x_in.shape[2:])}: `show` it one of the "
            "size that is drawn."
        )
    # Latent consistency models are told the guidance scale, trajectory models the time they jump to.
    projection = network.time_embedding.cond_proj
    numbers = () if projection is None else ("guidance", "target_time")
    refuse_unknown(condition, ("text", NEGATIVE, STRENGTH, *numbers), network)
    embedding = None if projection is None else _number_embedding(condition, projection.in_features, x_in)
    with tapped(network, features) as taps:
        y = network(
            torch.cat([x_in, *(picture.to(x_in) for picture in shown)], dim=1) if shown else x_in,
            t_net,
            encoder_hidden_states=condition["text"],
            timestep_cond=embedding,
            cross_attention_kwargs=negative_arguments(network, condition),
            **options,
        ).sample
    return y, taps


def _number_embedding(condition: Condition, width: int, x_in: Tensor) -> Tensor:
    """What a UNet with an additional input is told: sines and cosines of a number, (batch, width).

    The number is w = scale - 1 for a guidance-distilled UNet (Meng et al. 2023, arXiv 2210.03142), multiplied by 1000
    as in latent consistency models. For a target time it is the time as a fraction of the table. Both are 0 unless the
    condition says otherwise: no guidance, a jump to clean data.
    """
    if "target_time" in condition:
        if "guidance" in condition:
            raise ValueError("A UNet has one additional input: tell it the guidance scale or a target time, not both.")
        number = (condition["target_time"].float() + 1) / 1000
    elif "guidance" in condition:
        number = condition["guidance"].float() - 1
    else:
        number = torch.zeros(len(x_in), device=x_in.device)
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=x_in.device) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * number[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return nn.functional.pad(embedding, (0, width % 2)).to(x_in.dtype)
