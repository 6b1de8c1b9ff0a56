"""EM distillation: one-step distillation by expectation-maximisation, with Langevin chains (Xie et al. 2024)."""

from __future__ import annotations

import math
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sublimate.diffusion.predictions import per_sample, weighted_sum
from sublimate.training.losses import distance_to_teacher, pseudo_target_loss
from sublimate.training.matching import STUDENT, Matching, MatchingConfig
from sublimate.training.objective import Batch, Loss


class EMDistillationConfig(MatchingConfig):
    """Options of EM distillation; defaults are those recalled of the paper's ImageNet-64 run (not verified).

    Attributes:
        langevin_steps: K, steps of each chain.
        step_eps: gamma_eps, the chain's step size for the noise; below 2 over the largest curvature of -log rho.
        step_z: gamma_z, its step size for the student's input; 0 keeps z where it was drawn.
        noise_cancellation: leave what the chain's own noise added out of the student's target.
        sample_normalization: divide each sample's gradient by mean|x0 - mu_p|, DMD's weight.

    The others are `MatchingConfig`'s.
    """

    start_log_snr: float | None = -6.0
    langevin_steps: int = Field(default=16, ge=1)
    step_eps: float = Field(default=0.16, gt=0, lt=2)
    step_z: float = Field(default=1.6e-5, ge=0, lt=2)
    noise_cancellation: bool = True
    sample_normalization: bool = False

    @model_validator(mode="after")
    def _has_one_latent(self) -> Self:
        if self.sampling_steps > 1:
            raise ValueError("The chains move the noise of a student of one step: set sampling_steps to 1.")
        return self

    def student_passes(self, step: int = 0) -> float:
        scores = 1 + self.teacher_passes
        if self.step_z == 0:
            # One sample for the whole chain.
            return 1 + self.langevin_steps * scores + 3
        # Each step makes its sample and goes back to z through the student.
        return self.langevin_steps * (2 + scores) + 3


class EMDistillation(Matching):
    """Ascends E_{p_t(x_t)}[log q_t(x_t)], the teacher's samples under the student's density: forward KL.

    The student is a latent-variable model, x_t = alpha_t g(z) + sigma_t eps with z, eps ~ N(0, I). In place of the
    teacher's samples the E-step draws (eps, z) from the posterior-like

        rho(eps, z) = (p_t/q_t)(alpha_t g(z) + sigma_t eps) N(eps) N(z)                                  (section 3.2)

    by K Langevin steps from the student's own samples; with d = s_p - s_q at the chain's x_t, both moves from the same
    point,

        eps <- eps + gamma_eps (sigma_t d - eps) + sqrt(2 gamma_eps) n_eps
        z   <- z + gamma_z (alpha_t J_g(z)^T d - z) + sqrt(2 gamma_z) n_z.

    The M-step descends -log q(x_t^K | z^K), whose gradient is -(alpha_t/sigma_t) eps^K^T dg(z^K)/dtheta. The chain's
    noise is most of eps^K and none of its meaning; noise cancellation keeps beside it what the drift alone adds,

        c <- (1 - gamma_eps) c + gamma_eps sigma_t d,   c^0 = 0,

    and puts c^K in the place of eps^K (section 3.3). That is unbiased for gamma_z = 0. Otherwise z^K has seen the
    noise too, and the gradient lies between those of reverse and forward KL.

    The loss carries the weight w(t) = sigma_t^2/alpha_t^2, so that its gradient in x0 is -(sigma_t/alpha_t) c^K: for
    K = 1 and gamma_z = 0, -(sigma_t/alpha_t) gamma_eps sigma_t d = gamma_eps (mu_q - mu_p), exactly gamma_eps times
    variational score distillation's.

    Args:
        model: the teacher; stays frozen.
        config: options.
    """

    Config = EMDistillationConfig
    paper: ClassVar[str] = "2405.16852"

    def prepare_student(self, batch: Batch, step: int) -> Batch:
        # The chain moves its inputs only: without gradients to weights, none of its graphs keeps activations for them.
        player = self._players[STUDENT]
        player.set_trainable(False)
        try:
            z, direction = self.in_parts(self._langevin, batch)
        finally:
            player.set_trainable(True)
        return batch.adding(z=z, direction=direction)

    def _langevin(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The E-step: z^K, and the direction in which x0(z^K) descends."""
        c, device = self.config, batch["z"].device
        at = self.schedule.at(batch["t"])
        z, eps = batch["z"], batch["eps"]
        drift = torch.zeros_like(eps)
        moving, x0 = self._sampled(z, batch)
        for i in range(c.langevin_steps):
            if i > 0 and c.step_z > 0:
                moving, x0 = self._sampled(z, batch)
            x_t = weighted_sum(at.alpha, x0.detach(), at.sigma, eps)
            p = self.teach(x_t, batch)
            q = self.critic(x_t, batch["t"], batch.condition)
            # s_p - s_q = (alpha/sigma^2) (mu_p - mu_q)
            d = per_sample(at.alpha / at.sigma**2, x_t).float() * (p.x0 - q.x0).float()
            push = per_sample(at.sigma, x_t).float() * d
            if c.step_z > 0:
                pull = per_sample(at.alpha, x_t).float() * d
                (back,) = torch.autograd.grad(x0, moving, pull.to(x0.dtype))
                noise = batch.random.normal(self.shape, device)
                z = z + c.step_z * (back - z) + math.sqrt(2 * c.step_z) * noise
            noise = batch.random.normal(self.shape, device)
            eps = eps + c.step_eps * (push - eps) + math.sqrt(2 * c.step_eps) * noise
            drift = (1 - c.step_eps) * drift + c.step_eps * push
        residual = drift if c.noise_cancellation else eps
        direction = -per_sample(at.sigma / at.alpha, residual).float() * residual
        if c.sample_normalization:
            direction = direction / per_sample(distance_to_teacher(x0, p), direction)
        return z, direction

    def _sampled(self, z: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """z and x0 = g(z), differentiable in z where z moves."""
        z = z.detach().requires_grad_(self.config.step_z > 0)
        with torch.set_grad_enabled(self.config.step_z > 0):
            return z, self.generate(z, batch.condition)

    def student_loss(self, batch: Batch, step: int) -> Loss:
        """The M-step at z^K."""
        return Loss(pseudo_target_loss(self.generate(batch["z"], batch.condition), batch["direction"]).mean())
