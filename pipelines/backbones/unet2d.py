"""UNets on pixels without text: DDPM and DDIM checkpoints, and EDM-preconditioned ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.predictions import Parametrization
from sublimate.diffusion.schedules import EDM, Schedule
from sublimate.pipelines.backbones.base import Backbone, Network, Pipeline, StockSampling, refuse_unknown
from sublimate.pipelines.features import tapped, unet_taps
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.one_step import consistency_at, ddim_at
from sublimate.pipelines.stock_few_steps import consistency_sampling, table_sampling


class UNet2D(Backbone):
    """`DDPMPipeline` and `DDIMPipeline`: a `UNet2DModel` on images in [-1, 1], unconditional."""

    pipeline_classes: ClassVar[tuple[str, ...]] = ("DDPMPipeline", "DDIMPipeline")
    network_attribute = "unet"

    @staticmethod
    def call(
        network: Network, x_in: Tensor, t_net: Tensor, condition: Condition, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        refuse_unknown(condition, ("text",) if network.config.num_class_embeds else (), network)
        with tapped(network, features) as taps:
            y = network(x_in, t_net, class_labels=condition.get("text")).sample
        # A network that also predicts its variance does so in the second half of the channels.
        return y[:, : x_in.shape[1]], taps

    def latent_shape(
        self, pipe: Pipeline, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        size = pipe.unet.config.sample_size
        own = (size, size) if isinstance(size, int) else tuple(size)
        wanted = (own[0] if height is None else height, own[1] if width is None else width)
        if wanted != own:
            raise ValueError(f"This model makes images of {own[0]}x{own[1]} pixels only, not {wanted[0]}x{wanted[1]}.")
        return (pipe.unet.config.in_channels, *own)

    def encode_prompts(self, pipe: Pipeline, prompts: Sequence[str]) -> Condition:
        """Nothing for an unconditional model; for one with classes, prompts are class numbers ("207")."""
        classes = pipe.unet.config.num_class_embeds
        if isinstance(prompts, str):
            raise TypeError(f"Give a list of prompts: [{prompts!r}].")
        if not classes:
            if any(prompts):
                raise ValueError(f"This model is unconditional and cannot read {next(filter(None, prompts))!r}.")
            return Condition()
        if bad := [p for p in prompts if not (p.isdecimal() and int(p) < classes)]:
            raise ValueError(f"This model's prompts are class numbers from 0 to {classes - 1}, not {bad[0]!r}.")
        return Condition({"text": torch.tensor([int(p) for p in prompts], device=pipe.unet.device)})

    def null_condition(self, pipe: Pipeline) -> Condition:
        return Condition()

    def encode(self, pipe: Pipeline, images: Tensor) -> Tensor:
        return 2 * images.to(pipe.unet.dtype) - 1

    def decode(self, pipe: Pipeline, latents: Tensor) -> Tensor:
        return latents / 2 + 0.5

    def one_step(self, pipe: Pipeline, t: float | None = None) -> StockSampling:
        if pipe.unet.config.num_class_embeds:
            raise ValueError("DDIMPipeline cannot pass class labels, so no stock pipeline runs this student.")
        if pipe.unet.config.out_channels != pipe.unet.config.in_channels:
            raise ValueError("DDIMPipeline cannot run a network that also predicts its variance: train without it.")
        return StockSampling("DDIMPipeline", ddim_at(pipe.scheduler, t), {"num_inference_steps": 1})

    def few_steps(self, pipe: Pipeline, few: FewSteps) -> StockSampling:
        self.one_step(pipe)  # refuses the networks that no stock pipeline runs
        scheduler, call = table_sampling(pipe.scheduler, self.schedule(pipe), few)
        if call.keys() != {"num_inference_steps"}:
            raise ValueError(
                f"DDPMPipeline cannot be told {' or '.join(sorted(call.keys() - {'num_inference_steps'}))}: sample by "
                "consistency (eta 1), at times of the table's own grid."
            )
        return StockSampling("DDPMPipeline", scheduler, call, few)

    def feature_taps(self, network: Network) -> tuple[str, ...]:
        return unet_taps(network)


class PreconditionedUNet2D(UNet2D):
    """`ConsistencyModelPipeline`: the stock home of a `UNet2DModel` with EDM's preconditioning, classes or none.

    Read as the denoiser of Karras et al. 2022. Consistency models (Song et al. 2023, appendix C) use sigma - sigma_min
    in its coefficients, which differs by the fraction sigma_min / sigma of the output; our exports say sigma_min = 0,
    where both are the same.
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

    def one_step(self, pipe: Pipeline, t: float | None = None) -> StockSampling:
        return StockSampling("ConsistencyModelPipeline", consistency_at(pipe.scheduler, t), {"num_inference_steps": 1})

    def few_steps(self, pipe: Pipeline, few: FewSteps) -> StockSampling:
        scheduler, call, rounded = consistency_sampling(pipe.scheduler, self.schedule(pipe), few)
        return StockSampling("ConsistencyModelPipeline", scheduler, call, rounded)
