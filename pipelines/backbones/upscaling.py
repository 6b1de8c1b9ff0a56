"""Stable Diffusion's upscaler: its UNet also sees a small image, with noise of a level that it is told."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.autoencoders import decode_latents, encode_images, exact
from sublimate.pipelines.backbones.base import Draws, Network, Pipeline, StockSampling
from sublimate.pipelines.backbones.stable_diffusion import StableDiffusion, call_unet
from sublimate.pipelines.few_steps import FewSteps

LOW_RES, NOISE_LEVEL = "extra.low_res", "extra.noise_level"


class Upscaling(StableDiffusion):
    """`StableDiffusionUpscalePipeline`, whose UNet has 7 channels: x_t and a small image of the latents' size.

    "extra.low_res" is that image, (batch, 3, height, width) of latents, in [-1, 1] before noise is added, and
    "extra.noise_level" the noise's time in the low_res_scheduler's table, (batch,) int64. Prompts alone are not enough
    to draw by.
    """

    pipeline_classes = ("StableDiffusionUpscalePipeline",)
    guidance_scale = 9.0
    shown = "low_res"
    shown_arguments = ("image=small_image",)
    draws_from_text = False

    @staticmethod
    def call(
        network: Network, x_in: Tensor, t_net: Tensor, condition: Condition, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not {LOW_RES, NOISE_LEVEL} <= condition.keys():
            raise ValueError(f"Upscaling needs {LOW_RES!r} and {NOISE_LEVEL!r}: `show` the model a small image.")
        rest = Condition({key: value for key, value in condition.items() if key not in (LOW_RES, NOISE_LEVEL)})
        return call_unet(
            network, x_in, t_net, rest, features, (condition[LOW_RES],), class_labels=condition[NOISE_LEVEL]
        )

    def null_condition(self, pipe: Pipeline) -> Condition:
        shape = (1, 3, *self.latent_shape(pipe)[1:])
        grey = self.show(pipe, low_res=torch.full(shape, 0.5), noise=torch.zeros(shape))
        return super().null_condition(pipe).replace(**grey)

    def show(self, pipe: Pipeline, *, low_res: Tensor, noise: Tensor, noise_level: Tensor | int = 20) -> Condition:
        """What the network is told of small images.

        Args:
            pipe: the pipeline.
            low_res: (batch, 3, height, width) of latents, in [0, 1].
            noise: N(0, I), shaped like it.
            noise_level: how much of it is added; a number or (batch,), from 0 to the pipeline's `max_noise_level`.
                The stock call's by default.

        Raises:
            ValueError: for a level that the checkpoint does not know.
        """
        device, highest = pipe.unet.device, pipe.config.max_noise_level
        level = torch.as_tensor(noise_level, dtype=torch.int64, device=device).expand(len(low_res))
        if bool((level < 0).any() or (level > highest).any()):
            raise ValueError(f"This upscaler knows noise levels from 0 to {highest}, not {level.tolist()}.")
        image = (2 * low_res - 1).to(device, pipe.unet.dtype)
        noised = pipe.low_res_scheduler.add_noise(image, noise.to(image), level)
        return Condition({LOW_RES: noised, NOISE_LEVEL: level})

    def show_examples(self, pipe: Pipeline, images: Tensor, draws: Draws) -> Condition:
        """Each image in the latents' size, with noise of any level."""
        small = F.interpolate(images, scale_factor=1 / pipe.vae_scale_factor, mode="area")
        noise, level = draws.normal(small.shape[1:]), draws.integers(pipe.config.max_noise_level + 1)
        return self.show(pipe, low_res=small, noise=noise, noise_level=level)

    def encode(self, pipe: Pipeline, images: Tensor) -> Tensor:
        return encode_images(exact(pipe.vae), images).to(pipe.vae.dtype)

    def decode(self, pipe: Pipeline, latents: Tensor) -> Tensor:
        return decode_latents(exact(pipe.vae), latents).to(pipe.vae.dtype)

    def few_steps(self, pipe: Pipeline, few: FewSteps) -> StockSampling:
        stock = super().few_steps(pipe, few)
        if "timesteps" in stock.call:
            raise ValueError(
                "StableDiffusionUpscalePipeline cannot be told timesteps: sample at times of the table's own grid."
            )
        return stock

    def with_number_input(self, network: Network) -> Network:
        raise ValueError("StableDiffusionUpscalePipeline cannot be told the guidance scale or a target time.")
