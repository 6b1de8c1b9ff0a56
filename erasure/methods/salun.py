"""SalUn: teaches a concept's prompt what its anchor's says, in the weights that its loss depends on most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from sublimate.diffusion.guidance import guided
from sublimate.erasure.fine_tuning import FineTuningEraser
from sublimate.erasure.pictured import PicturedConfig, PicturedObjective
from sublimate.erasure.request import Request
from sublimate.erasure.saliency import largest
from sublimate.erasure.weights import Rule
from sublimate.pipelines.gradient_checkpointing import enable_gradient_checkpointing
from sublimate.pipelines.model import Model
from sublimate.training.losses import denoising_loss
from sublimate.training.objective import Batch, Loss, Turn
from sublimate.training.precision import autocast
from sublimate.training.randomness import SampleRandom


class SalUnConfig(PicturedConfig):
    """Options of SalUn; defaults are the authors' for forgetting a class with Stable Diffusion.

    Attributes:
        weights: they choose among all weights, "full", or cross-attention's, "x".
        saliency: the share of these weights that may move, over all layers together.
        saliency_guidance: guidance of the predictions whose loss finds them; their 7.5 counts from 0.
        retain: weight of the denoising loss on preserved concepts' pictures.

    The others are `PicturedConfig`'s and `FineTuningConfig`'s. Pictures of the concepts are drawn by the model, or
    `Concept.images`.
    """

    weights: Rule = "full"
    max_train_steps: int = Field(default=560, ge=1)
    train_batch_size: int = Field(default=8, ge=1)
    saliency: float = Field(default=0.5, gt=0, le=1)
    saliency_guidance: float = Field(default=8.5, ge=0)
    retain: float = Field(default=0.5, ge=0)

    def brief(self) -> Self:
        # All weights are in the mask: finding some depends on values.
        return super().brief().model_copy(update={"saliency": 1.0})

    def of_single_weights(self) -> str | None:
        return "saliency"

    def passes(self, step: int = 0) -> float:
        """Without pictures and mask; for a request with preserved concepts, if `retain` is set."""
        return 3 + 1 + 3 * (self.retain > 0)


class SalUnObjective(PicturedObjective):
    """E |y_theta(x_t, c, t) - sg[y_theta(x_t, c_a, t)]|^2 + retain E |eps - eps_theta(x_t^r, c_r, t)|^2 on a mask.

    x_t are noised pictures of the concept c, x_t^r of preserved concepts; both predictions of the first term are the
    current network's. The mask holds the weights with the largest |grad| of the concept's (guided) denoising loss,
    summed over its pictures before training; other weights stay as they are, bit by bit.
    """

    Config = SalUnConfig
    paper: ClassVar[str] = "2310.12508"
    config: SalUnConfig
    shows = "concept"

    def __init__(self, model: Model, config: SalUnConfig, request: Request, *, seed: int = 0) -> None:
        super().__init__(model, config, request, seed=seed)
        self.masks = largest({name: g.abs() for name, g in self.saliency().items()}, config.saliency)
        self.player.restrict(self.masks)

    def saliency(self) -> dict[str, Tensor]:
        """The gradient of the concept's denoising loss in every trained weight, summed over its pictures."""
        config, parameters = self.config, self.player.trainable()
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        pictures, size = self.pictures.each(), config.train_batch_size
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(self.student)
        self.player.set_trainable(True)
        for start in range(0, len(pictures), size):
            rows, latents = zip(*pictures[start : start + size], strict=True)
            random = SampleRandom(self.seed, 0, "saliency", range(start, start + len(rows)))
            noisy = self.noise(random, torch.tensor(rows), torch.stack(latents).to(self.device))
            told, null = self.erased.condition(noisy["rows"], self.device), self.null.to(self.device)
            with autocast(self.device, config.mixed_precision):
                prediction = guided(self.student, noisy["x_t"], noisy["t"], told, null, config.saliency_guidance)
            loss = denoising_loss(prediction, noisy["x0"], noisy["eps"]).sum()
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(total, found, strict=True):
                if gradient is not None:  # of SD3's last block text is not read
                    total[name] += gradient
        self.player.set_trainable(False)
        return total

    def state(self) -> dict[str, Tensor]:
        return self.masks

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        # Gradients need not repeat bit by bit on another machine, and a weight that has moved must stay in the mask.
        self.masks.update({name: mask.to(self.device) for name, mask in state.items()})

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        return self.weighed(batch, {"erase": (1.0, self.swap_error(batch))})


class SalUn(FineTuningEraser):
    """Saliency Unlearning (Fan et al. 2024)."""

    Config = SalUnConfig
    paper: ClassVar[str] = SalUnObjective.paper
    objective = SalUnObjective
    uses_images = True
    uses_kept_images = True
