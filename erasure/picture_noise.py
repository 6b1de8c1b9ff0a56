"""Noise that has the colours of given pictures and nothing else of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sublimate.erasure.latent_bank import LatentBank
from sublimate.pipelines.model import Model
from sublimate.training.randomness import SampleRandom


class PictureNoise:
    """N(mu, Sigma) per pixel, with mean and covariance of the channels over all pixels of all pictures.

    Args:
        model: renders the pictures.
        pictures: their latents.
        batch_size: pictures rendered at a time.

    Attributes:
        mean: mu, (channels,) float64 on the CPU.
        covariance: Sigma, (channels, channels) float64 on the CPU.
    """

    def __init__(self, model: Model, pictures: LatentBank, batch_size: int) -> None:
        latents = torch.stack([latent for _, latent in pictures.each()])
        count, total, square = 0, torch.zeros(()), torch.zeros(())
        with torch.no_grad():
            for part in latents.split(batch_size):
                pixels = model.render(part.to(model.device)).double().cpu().movedim(1, -1).flatten(0, -2)
                count, total, square = count + len(pixels), total + pixels.sum(0), square + pixels.mT @ pixels
        self.mean = total / count
        self.covariance = square / count - torch.outer(self.mean, self.mean)
        # Pictures of one colour have a singular covariance, which no Cholesky factor would survive.
        values, vectors = torch.linalg.eigh(self.covariance)
        self._root = vectors * values.clamp_min(0).sqrt()

    def draw(self, random: SampleRandom, size: Sequence[int]) -> Tensor:
        """One picture per sample, (batch, channels, *size) float32 on the CPU; not clamped, to keep mu and Sigma."""
        white = random.normal((len(self.mean), *size)).double()
        noise = torch.einsum("ij,bj...->bi...", self._root, white)
        return (noise + self.mean.view(-1, *[1] * len(size))).float()
