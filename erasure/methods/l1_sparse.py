"""l1-sparse unlearning: fine-tunes on what is preserved alone, under an l1 penalty of all weights that fades."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sublimate.erasure.fine_tuning import FineTuningEraser
from sublimate.erasure.pictured import DrawingConfig, KeptPicturesObjective
from sublimate.erasure.request import Request
from sublimate.erasure.weights import Rule
from sublimate.pipelines.model import Model
from sublimate.training.objective import Batch, Loss, Turn


class L1SparseConfig(DrawingConfig):
    """Options of l1-sparse unlearning. The paper's are of classifiers trained by SGD; here Adam takes the steps.

    Attributes:
        weights: which train, and shrink.
        l1: alpha, what gamma starts at; the paper's 5e-4 is recalled (not verified).
        l1_steps: training steps until gamma is 0.
        retain: weight of the denoising loss on pictures of preserved concepts.

    The others are `DrawingConfig`'s and `FineTuningConfig`'s.
    """

    weights: Rule = "full"
    l1: float = Field(default=5e-4, ge=0)
    l1_steps: int = Field(default=1000, ge=1)
    retain: float = Field(default=1.0, gt=0)

    def of_single_weights(self) -> str | None:
        return "l1"

    def gamma(self, step: int) -> float:
        """gamma_t = alpha max(0, 1 - t / T) with T = `l1_steps`."""
        return self.l1 * max(0.0, 1 - step / self.l1_steps)

    def passes(self, step: int = 0) -> float:
        """Without pictures."""
        return 3


class L1SparseObjective(KeptPicturesObjective):
    """E |y_theta(x_t, c, t) - y|^2 + gamma_t |theta|_1 over noised pictures of preserved concepts c and their own y.

    What is to be erased takes no part: it fades with the weights that nothing preserved asks for.
    """

    Config = L1SparseConfig
    paper: ClassVar[str] = "2304.04934"
    config: L1SparseConfig

    def __init__(self, model: Model, config: L1SparseConfig, request: Request, *, seed: int = 0) -> None:
        if not request.preserve:
            raise ValueError("l1_sparse trains on what is preserved alone: name concepts to preserve.")
        super().__init__(model, config, request, seed=seed)

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        gamma, terms = self.config.gamma(step), {}
        if gamma > 0:
            terms["l1"] = gamma, self.norm()
        return self.weighed(batch, terms)

    def norm(self) -> Tensor:
        """|theta|_1 of the weights that train, a scalar."""
        return torch.stack([parameter.abs().sum() for parameter in self.player.trainable().values()]).sum()


class L1Sparse(FineTuningEraser):
    """l1-sparse machine unlearning (Jia et al. 2023), carried over from classifiers."""

    Config = L1SparseConfig
    paper: ClassVar[str] = L1SparseObjective.paper
    objective = L1SparseObjective
    uses_anchor = False
    uses_kept_images = True
