"""Uni-Instruct: one-step distillation by the exact gradient of an expanded f-divergence (Wang et al. 2025)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sublimate.diffusion.predictions import Prediction, per_sample
from sublimate.training.losses import (
    Divergence,
    density_ratio,
    distance_to_teacher,
    f_weight_terms,
    generator_loss,
    identity_terms,
)
from sublimate.training.matching import AdversarialConfig, Matching
from sublimate.training.objective import Batch, Loss
from sublimate.training.players import WITHOUT_MOMENTUM, PlayerConfig
from sublimate.training.teacher import Teacher


class UniInstructConfig(AdversarialConfig):
    """Options of Uni-Instruct; defaults are those published for CIFAR-10 (start sigma 2.5, one critic update).

    Attributes:
        divergence: which D_f(teacher || student) to minimise; reverse KL without the adversarial term is data-free.
        gan_weight: weight of the adversarial term; 0.01 beside 100 for the divergence is published, 0 leaves it out.
        ratio_bounds: clamp of the density ratio r, beyond which h is constant; None leaves it free.
        exact_weighting: draw times uniformly in log-SNR, between a table's too, and weight them so that the loss is
            the divergence per element; off, times are drawn as the schedule trains and every sample's loss is divided
            by mean|x0 - mu_p|, adversarial term included, as in SiD.

    The others are `AdversarialConfig`'s and `MatchingConfig`'s.
    """

    divergence: Divergence = "forward_kl"
    start_log_snr: float | None = -2 * math.log(2.5)
    time_range: tuple[float, float] = (0.0, 0.8)
    gan_weight: float = Field(default=1e-4, ge=0)
    ratio_bounds: tuple[float, float] | None = (0.1, 20.0)
    exact_weighting: bool = False
    student: PlayerConfig = WITHOUT_MOMENTUM
    critic: PlayerConfig = WITHOUT_MOMENTUM
    discriminator: PlayerConfig = WITHOUT_MOMENTUM

    @property
    def weighted(self) -> bool:
        """Whether h(r) is anything but 1."""
        return self.divergence != "reverse_kl"

    @property
    def adversarial(self) -> bool:
        return self.weighted or self.gan_weight > 0

    def student_passes(self, step: int = 0) -> float:
        # The student forward and backward; critic and teacher forward and back to their input.
        return 3 + 2 * (1 + self.teacher_passes)


class UniInstruct(Matching):
    """Minimises D_f(p_t0 || q_t0) - D_f(p_T || q_T), written as an integral over noise levels that can be descended.

    With r = p_t/q_t, h(r) = f''(r) r^2 and d = s_p - s_q, diffusion lets an f-divergence decay by

        d/dt D_f(p_t || q_t) = -(g^2/2) E_{q_t}[h(r) |d|^2],   g^2 = alpha^2 d(sigma^2/alpha^2)/dt,      (theorem 3.1)

    so the difference is the integral of (g^2/2) E[h |d|^2]. Its gradient would need ds_q/dtheta, which nobody has. The
    score identity E[u(x_t)^T m] = 0 for m = s_q + eps/sigma and every u that does not depend on theta, differentiated
    in theta, trades it for derivatives through the sample: E[u^T ds_q/dtheta] = -d/dtheta E[u(x_t)^T m] with u held.
    Likewise E[c d(log q)/dtheta] = d/dtheta E[c(x_t)]. With grad_x r = r d the whole gradient is that of

        (g^2/2) { sg[h - r h'] |d|^2 + 2 sg[h] d^T m + sg[(2 r h' d^T m - r^2 h'' |d|^2) d]^T x_t }      (theorem 3.2)

    through x_t and x0 alone, the networks' weights fixed: a term as in score implicit matching, and one as in
    Diff-Instruct. Nothing is differentiated through r, so the discriminator's own slope does not matter. For reverse
    KL, h = 1 and this is twice SiD's loss at alpha = 1/2.

    In the code d = (alpha/sigma^2) (mu_p - mu_q) and m = (alpha/sigma^2) (mu_q - x0). The measure of the integral is
    (g^2/2) dt = (sigma^2/2) d(log-SNR) on every schedule, so with log-SNR drawn uniformly from a range of length l
    the weight of the mu-form is l alpha^2/(2 sigma^2).

    Args:
        model: the teacher; stays frozen.
        config: options.

    Raises:
        ValueError: for exact weighting of a time range without a beginning or an end in log-SNR.
    """

    Config = UniInstructConfig
    paper: ClassVar[str] = "2505.20755"

    def __init__(self, model: Teacher, config: UniInstructConfig) -> None:
        super().__init__(model, config)
        # log-SNR of the noisiest level used, and from there to the cleanest.
        ends = self.schedule.uniform_time(torch.tensor(config.time_range, dtype=torch.float64))
        clean, self._noisiest = self.schedule.log_snr(ends).tolist()
        self._span = clean - self._noisiest
        if config.exact_weighting and not 0 < self._span < math.inf:
            raise ValueError(
                f"objective.exact_weighting integrates over log-SNR, which runs from {self._noisiest:g} to {clean:g} "
                f"in objective.time_range={config.time_range}: choose a range whose ends are finite and differ."
            )

    def draw(self, batch: Batch) -> Batch:
        batch = super().draw(batch)
        if not self.config.exact_weighting:
            return batch
        u = batch.random.uniform(batch["t"].device)
        return batch.adding(t=self.schedule.t_at_log_snr(self._noisiest + self._span * u))

    def student_loss(self, batch: Batch, step: int) -> Loss:
        x0 = self.sample(batch)
        x_t = self.noised(x0, batch)
        q = self.critic(x_t, batch["t"], batch.condition)
        p = self.teach(x_t, batch, features=self.taps)
        logits = self.discriminator(p, batch["t"]) if self.config.adversarial else None
        integrand = self.integrand(x0, x_t, p, q, self._ratio(logits, x0))
        if self.config.exact_weighting:
            scale: Tensor | float = 1.0
            integrand = self._span * self.schedule.log_snr(batch["t"]).exp() / 2 * integrand
        else:
            scale = 1 / distance_to_teacher(x0, p)
        divergence = (scale * integrand).mean()
        if self.config.gan_weight == 0 or logits is None:
            return Loss(divergence)
        # The teacher's features were differentiated for d already, so this term costs no pass of its own.
        gan = (scale * generator_loss(logits)).mean()
        return Loss(divergence + self.config.gan_weight * gan, {"student/divergence": divergence, "student/gan": gan})

    def integrand(self, x0: Tensor, x_t: Tensor, p: Prediction, q: Prediction, ratio: Tensor) -> Tensor:
        """The braces of theorem 3.2 times sigma^4/alpha^2, per sample as a mean over elements; (batch,)."""
        c = p.coefficients
        h, rh1, r2h2 = f_weight_terms(self.config.divergence, ratio)
        if self.config.ratio_bounds is not None:
            low, high = self.config.ratio_bounds
            free = (low < ratio) & (ratio < high)
            rh1, r2h2 = rh1 * free, r2h2 * free
        cross, squared = identity_terms(x0, p, q)
        # d^T m = d^T (mu_p - x0) - |d|^2 in units of mu.
        loss = 2 * h * cross + (h - rh1 - 2 * h) * squared
        if self.config.weighted:
            push = (2 * rh1 * (cross - squared) - r2h2 * squared).detach()
            d = per_sample(c.alpha / c.sigma**2, x_t).to(squared.dtype) * (p.x0 - q.x0).detach().to(squared.dtype)
            loss = loss + push * (d * x_t.to(squared.dtype)).flatten(1).sum(1)
        return loss / x0[0].numel()

    def _ratio(self, logits: Tensor | None, x0: Tensor) -> Tensor:
        """r per sample, (batch,)."""
        if logits is None or not self.config.weighted:
            return torch.ones(len(x0), device=x0.device, dtype=torch.promote_types(x0.dtype, torch.float32))
        return density_ratio(logits, self.config.ratio_bounds)
