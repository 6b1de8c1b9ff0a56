"""UNets on pixels, unconditional or told a class: DDPM and DDIM checkpoints, and EDM-preconditioned ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.predictions import Parametrization
from sublimate.diffusion.schedules import EDM, Schedule
from sublimate.pipelines.backbones.base import (
    Backbone,
    EntryPoint,
    Network,
    Pipeline,
    StockSampling,
    refuse_other_sizes,
    refuse_unknown,
)
from sublimate.pipelines.classes import class_names, find_class, read_classes
from sublimate.pipelines.features import tapped, unet_taps
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.one_step import consistency_at, ddim_at
from sublimate.pipelines.stock_few_steps import consistency_sampling, steps_alone, table_sampling
from sublimate.pipelines.tokens import TokenSpan


class UNet2D(Backbone):
    """`DDPMPipeline` and `DDIMPipeline`: a `UNet2DModel` on images in [-1, 1], unconditional or told a class.

    "text" is then the class's number, (batch,) int64. No class stands for none, so that there is no guidance. These
    stock pipelines pass no classes on: such a checkpoint can be drawn, trained and edited, but its students not saved.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("DDPMPipeline", "DDIMPipeline")
    network_attribute = "unet"

    @staticmethod
    def call(
        network: Network, x_in: Tensor, t_net: Tensor, condition: Condition, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        classes = _classes(network)
        if classes and "text" not in condition:
            raise ValueError(f"This model needs a text condition: encode a class, '0' to '{classes - 1}'.")
        refuse_unknown(condition, ("text",) if classes else (), network)
        with tapped(network, features) as taps:
            y = network(x_in, t_net, class_labels=condition.get("text")).sample
        # A network that also predicts its variance does so in the second half of the channels.
        return y[:, : x_in.shape[1]], taps

    def latent_shape(
        self, pipe: Pipeline, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        size = pipe.unet.config.sample_size
        own = (size, size) if isinstance(size, int) else tuple(size)
        refuse_other_sizes(own, height, width)
        return (pipe.unet.config.in_channels, *own)

    def encode_prompts(self, pipe: Pipeline, prompts: Sequence[str]) -> Condition:
        """Nothing for an unconditional model; for one with classes, prompts are their numbers ("207")."""
        if classes := _classes(pipe.unet):
            numbers = read_classes(prompts, class_names(pipe), classes)
            return Condition({"text": torch.tensor(numbers, device=pipe.unet.device)})
        if isinstance(prompts, str):
            raise TypeError(f"Give a list of prompts: [{prompts!r}].")
        if any(prompts):
            raise ValueError(f"This model is unconditional and cannot read {next(filter(None, prompts))!r}.")
        return Condition()

    def null_condition(self, pipe: Pipeline) -> Condition:
        return Condition()

    def any_condition(self, pipe: Pipeline) -> Condition:
        return self.encode_prompts(pipe, ["0" if _classes(pipe.unet) else ""])

    def encode(self, pipe: Pipeline, images: Tensor) -> Tensor:
        return 2 * images.to(pipe.unet.dtype) - 1

    def decode(self, pipe: Pipeline, latents: Tensor) -> Tensor:
        return latents / 2 + 0.5

    def one_step(self, pipe: Pipeline, t: float | None = None) -> StockSampling:
        if _classes(pipe.unet):
            raise ValueError("DDIMPipeline cannot pass class labels, so no stock pipeline runs this student.")
        if pipe.unet.config.out_channels != pipe.unet.config.in_channels:
            raise ValueError("DDIMPipeline cannot run a network that also predicts its variance: train without it.")
        return StockSampling("DDIMPipeline", ddim_at(pipe.scheduler, t), {"num_inference_steps": 1})

    def few_steps(self, pipe: Pipeline, few: FewSteps) -> StockSampling:
        self.one_step(pipe)  # refuses the networks that no stock pipeline runs
        scheduler, call = table_sampling(pipe.scheduler, self.schedule(pipe), few)
        return StockSampling("DDPMPipeline", scheduler, steps_alone("DDPMPipeline", call), few)

    def feature_taps(self, network: Network) -> tuple[str, ...]:
        return unet_taps(network)

    def text_entry_points(self, pipe: Pipeline) -> list[EntryPoint]:
        if not _classes(pipe.unet):
            return []
        table = pipe.unet.class_embedding
        if not isinstance(table, nn.Embedding):
            raise ValueError(f"{type(pipe).__name__} embeds classes as numbers here, without a table to edit.")
        return [EntryPoint("unet", "class_embedding", "text", slice(0, table.num_embeddings), bias=False)]

    def find_concept(self, pipe: Pipeline, prompt: str, concept: str) -> tuple[TokenSpan, ...]:
        return find_class(self.encode_prompts(pipe, [prompt, concept]), prompt, concept)


class PreconditionedUNet2D(UNet2D):
    """`ConsistencyModelPipeline`: the stock home of a `UNet2DModel` with EDM's preconditioning, classes or none.

    Read as the denoiser of Karras et al. 2022. Consistency models (Song et al. 2023, appendix C) use sigma - sigma_min
    in its coefficients, which differs by the fraction sigma_min / sigma of the output; our exports say sigma_min = 0,
    where both are the same. The stock pipeline passes classes on.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("ConsistencyModelPipeline",)
    sampler = "heun"

    def schedule(self, pipe: Pipeline, latent_shape: tuple[int, int, int] | None = None) -> Schedule:
        config = pipe.scheduler.config
        # A student of ours says sigma_min = 0, which is no noise level to call a network at: the paper's is used.
        # The network is told 1000 times c_noise = ln(sigma) / 4.
        return EDM(config.sigma_min or EDM().t_min, config.sigma_max, config.rho, time_factor=250.0)

    def parametrization(self, pipe: Pipeline) -> Parametrization:
        return Parametrization("edm", pipe.scheduler.config.sigma_data)

    def prompt_argument(self, pipe: Pipeline) -> str:
        return "class_labels=0" if _classes(pipe.unet) else ""

    def one_step(self, pipe: Pipeline, t: float | None = None) -> StockSampling:
        return StockSampling("ConsistencyModelPipeline", consistency_at(pipe.scheduler, t), {"num_inference_steps": 1})

    def few_steps(self, pipe: Pipeline, few: FewSteps) -> StockSampling:
        scheduler, call, rounded = consistency_sampling(pipe.scheduler, self.schedule(pipe), few)
        return StockSampling("ConsistencyModelPipeline", scheduler, call, rounded)


def _classes(network: Network) -> int:
    """How many classes a UNet is told apart; 0 for an unconditional one.

    Raises:
        ValueError: for one that is told something else, or an unknown number of classes.
    """
    count, kind = network.config.num_class_embeds, network.config.class_embed_type
    if kind not in (None, "timestep"):
        raise ValueError(f"A UNet2DModel with class_embed_type {kind!r} is told embeddings, which no prompt names.")
    if kind == "timestep" and count is None:
        raise ValueError("A UNet2DModel with class_embed_type 'timestep' needs num_class_embeds to say how many.")
    return count or 0
