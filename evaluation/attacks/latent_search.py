"""Latent search: moves each image's initial noise to where a detector sees the concept (SAGE)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from sublimate.evaluation.attack import Attack, Box, Case, Outcome
from sublimate.evaluation.surrogate import concept_loss
from sublimate.pipelines.generate import generate_latents, rendered
from sublimate.pipelines.model import Model
from sublimate.pipelines.sampling import at_once, initial_noise
from sublimate.training.config import Config


class LatentSearchConfig(Config):
    """Options of the search.

    Attributes:
        max_train_steps: updates of each image's noise.
        learning_rate: of Adam.
        surrogate_steps: sampling steps that the gradient goes through.
        batch_size: images at a time; by default fewer, the larger they are.
    """

    max_train_steps: int = Field(default=10, ge=1)
    learning_rate: float = Field(default=0.05, gt=0)
    surrogate_steps: int = Field(default=4, ge=1)
    batch_size: int | None = Field(default=None, ge=1)


class LatentSearch(Attack):
    """min_z -log p(concept | G(z, c)) with |z| = sqrt(d), for prompts c that name the concept.

    The sphere keeps the noise typical: what is found there is an image that the model may draw by chance.
    """

    Config = LatentSearchConfig
    paper: ClassVar[str] = "2306.00974"
    box: ClassVar[Box] = "white box"
    every_level: ClassVar[bool] = True
    differentiates: ClassVar[bool] = True

    @property
    def budget(self) -> str:
        c = self.config
        return f"{c.max_train_steps} updates of each noise through {c.surrogate_steps} steps"

    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        c, images = self.config, []
        size = c.batch_size or at_once(model.latent_shape, 16, cost=8 * c.surrogate_steps)
        for start in range(0, len(case.prompts), size):
            part = case.prompts[start : start + size]
            z = initial_noise(model.latent_shape, seed, range(start, start + len(part))).to(model.device)
            radius = z[0].numel() ** 0.5
            z = _on_sphere(z, radius).requires_grad_(True)
            adam = torch.optim.Adam([z], lr=c.learning_rate)
            for _ in range(c.max_train_steps):
                with torch.enable_grad():
                    loss = concept_loss(model, case, part, z, c.surrogate_steps).sum()
                (z.grad,) = torch.autograd.grad(loss, [z])
                adam.step()
                with torch.no_grad():
                    z.copy_(_on_sphere(z, radius))
            latents = generate_latents(model, part, z=z.detach(), seed=seed, first=start, progress=progress)
            with torch.no_grad():
                images.append(rendered(model, latents))
        return Outcome.seen(case, case.prompts, torch.cat(images))


def _on_sphere(z: torch.Tensor, radius: float) -> torch.Tensor:
    return z * (radius / z.flatten(1).norm(dim=1).clamp_min(1e-12)).reshape(-1, *[1] * (z.ndim - 1))
