"""Stable Diffusion's inpainting UNets: they also see which part to paint, and what lies around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.autoencoders import encode_media
from sublimate.pipelines.backbones.base import Draws, Network, Pipeline
from sublimate.pipelines.backbones.stable_diffusion import StableDiffusion, call_unet

MASK, MASKED = "extra.mask", "extra.masked"


class Inpainting(StableDiffusion):
    """`StableDiffusionInpaintPipeline` with a UNet of 9 channels: x_t, a mask, and latents of the image without it.

    "extra.mask" is (batch, 1, height, width) of latents, 1 where to paint, and "extra.masked" the latents of the image
    with that part in grey. Prompts alone ask for everything to be painted, as a quarter of the training of Stable
    Diffusion's inpainting checkpoints does: text-to-image.

    The stock pipeline samples the posterior of the masked image's latents, whose mode this is.
    """

    pipeline_classes = ("StableDiffusionInpaintPipeline",)
    shown = "masks"
    shown_arguments = ("image=image", "mask_image=mask")

    @staticmethod
    def call(
        network: Network, x_in: Tensor, t_net: Tensor, condition: Condition, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not {MASK, MASKED} <= condition.keys():
            raise ValueError(f"Inpainting needs {MASK!r} and {MASKED!r}: `show` the model an image and a mask.")
        rest = Condition({key: value for key, value in condition.items() if key not in (MASK, MASKED)})
        return call_unet(network, x_in, t_net, rest, features, (condition[MASK], condition[MASKED]))

    def latent_shape(
        self, pipe: Pipeline, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        shape = super().latent_shape(pipe, height, width)
        if pipe.unet.config.in_channels != 2 * shape[0] + 1:
            raise ValueError(
                f"This UNet of {pipe.unet.config.in_channels} channels sees no mask: open it as a "
                "StableDiffusionPipeline, by its name in model_index.json."
            )
        return shape

    def encode_prompts(self, pipe: Pipeline, prompts: Sequence[str]) -> Condition:
        text = super().encode_prompts(pipe, prompts)
        _, height, width = self.latent_shape(pipe)
        grey = torch.full((1, 3, height * pipe.vae_scale_factor, width * pipe.vae_scale_factor), 0.5)
        everything = self.show(pipe, images=grey, masks=torch.ones_like(grey[:, :1]))
        return text.replace(**everything.expand(len(prompts)))

    def show(self, pipe: Pipeline, *, images: Tensor, masks: Tensor) -> Condition:
        """What the network is told of images and of what to paint in them.

        Args:
            pipe: the pipeline.
            images: (batch, 3, height, width) in [0, 1].
            masks: (batch, 1, height, width) or (1, 1, height, width), at least 0.5 where to paint.

        Raises:
            ValueError: when they differ in size.
        """
        if masks.shape[1:] != (1, *images.shape[2:]) or len(masks) not in (1, len(images)):
            raise ValueError(f"Masks of {tuple(masks.shape)} do not fit images of {tuple(images.shape)}.")
        images, masks = images.to(pipe.vae.device), masks.to(pipe.vae.device)
        painted = (masks >= 0.5).to(images)
        masked = encode_media(pipe.vae, (2 * images - 1) * (1 - painted))
        mask = F.interpolate(painted, size=masked.shape[2:], mode="nearest")
        return Condition({MASK: mask.to(masked).expand(len(images), -1, -1, -1), MASKED: masked})

    def show_examples(self, pipe: Pipeline, images: Tensor, draws: Draws) -> Condition:
        """A rectangle to paint in each image, everything in a quarter of them."""
        return self.show(pipe, images=images, masks=rectangles(draws, *images.shape[2:]))


def rectangles(draws: Draws, height: int, width: int) -> Tensor:
    """A mask per sample, (batch, 1, height, width): 1 within a rectangle, and everywhere in a quarter of the samples.

    Sides are uniform between a quarter of the image's and the whole.
    """
    inside = []
    everything = draws.uniform() < 0.25
    for size in (height, width):
        side = torch.where(everything, size, (size * (0.25 + 0.75 * draws.uniform())).ceil())
        start = ((size - side + 1) * draws.uniform()).floor()
        places = torch.arange(size)
        inside.append((places >= start[:, None]) & (places < (start + side)[:, None]))
    rows, columns = inside
    return (rows[:, None, :, None] & columns[:, None, None, :]).float()
