"""f-distill: one-step distillation by any f-divergence; reverse KL is DMD2 (Xu, Nie & Vahdat 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from sublimate.diffusion.predictions import per_sample
from sublimate.training.losses import (
    F_DIVERGENCES,
    Divergence,
    density_ratio,
    generator_loss,
    pseudo_target_loss,
    score_difference,
)
from sublimate.training.matching import AdversarialConfig, Matching
from sublimate.training.objective import Batch, Loss
from sublimate.training.teacher import Teacher


class FDistillConfig(AdversarialConfig):
    """Options of f-distill; defaults are FastGen's for Stable Diffusion 1.5, but for noise levels, DMD2's.

    Attributes:
        divergence: which D_f(teacher || student) to minimise.
        gan_weight: weight of the adversarial term; 0 leaves it out.
        ratio_bounds: clamp of the density ratio r; None leaves it free.
        ratio_normalization: divide r by its running mean at similar log-SNR, because E_q[r] = 1 at every level.
        ratio_bins: bins of equal width in log-SNR for that mean.
        ratio_ema_rate: how much of the running mean is kept per update; 0 uses the current batch alone.
        weight_normalization: divide h(r) by its batch mean.
        sample_normalization: divide each sample's gradient by mean|x0 - mu_p|, DMD's weight (DMD2, eq. 8 of DMD).

    The others are `AdversarialConfig`'s and `MatchingConfig`'s.
    """

    divergence: Divergence = "jensen_shannon"
    guidance_scale: float = Field(default=1.75, ge=1)
    gan_weight: float = Field(default=1e-3, ge=0)
    critic_updates: int = Field(default=9, ge=1)
    ratio_bounds: tuple[float, float] | None = (0.1, 20.0)
    ratio_normalization: bool = True
    ratio_bins: int = Field(default=10, ge=1)
    ratio_ema_rate: float = Field(default=0.0, ge=0, lt=1)
    weight_normalization: bool = True
    sample_normalization: bool = True

    @property
    def adversarial(self) -> bool:
        return self.weighted or self.gan_weight > 0

    @property
    def weighted(self) -> bool:
        """Whether h(r) is anything but 1."""
        return self.divergence != "reverse_kl"

    def student_passes(self, step: int = 0) -> float:
        # The student forward and backward, critic and teacher; weights of the whole batch need its samples first, and
        # the adversarial term a differentiable pass through the teacher.
        return 3 + 1 + self.teacher_passes + self.weighted + 2 * (self.gan_weight > 0)


class FDistill(Matching):
    """Minimises E_t[w_t D_f(p_t || q_t)] between the teacher's and the one-step student's noised distributions.

    With r = p_t/q_t and h(r) = f''(r) r^2,

        grad D_f(p_t || q_t) = E_{z,eps}[ -h(r(x_t)) (s_p(x_t) - s_q(x_t))^T alpha_t dx0/dtheta ]        (Theorem 1)

    s_p is the (guided) teacher's score, s_q the critic's, and r comes from the discriminator. Reverse KL has h = 1: no
    ratio is needed, and without the adversarial term no data either.

    The discriminator's ratio is that of the `images` it is shown: show it the teacher's own guided samples when r
    shall belong to the teacher, and always when the teacher was edited.

    Args:
        model: the teacher; stays frozen.
        config: options.
    """

    Config = FDistillConfig
    paper: ClassVar[str] = "2502.15681"

    def __init__(self, model: Teacher, config: FDistillConfig) -> None:
        super().__init__(model, config)
        # Log-SNR falls with t, so the first bin is the noisiest level used.
        ends = self.schedule.log_snr(self.schedule.uniform_time(torch.tensor(config.time_range).flip(0).double()))
        if config.weighted and config.ratio_bins > 1 and not bool(ends.isfinite().all()):
            raise ValueError(
                f"objective.ratio_bins divide the log-SNR, which runs from {ends[0]:g} to {ends[1]:g} in "
                f"objective.time_range={config.time_range}: choose a range whose ends are finite, or a single bin."
            )
        self._bin_edges = torch.linspace(float(ends[0]), float(ends[1]), config.ratio_bins + 1)[1:-1]
        self._bin_means = torch.ones(config.ratio_bins)

    def prepare_student(self, batch: Batch, step: int) -> Batch:
        # Means over bins and over the batch couple the samples, so weighted directions are decided here.
        if not self.config.weighted:
            return batch
        difference, ratio = self.in_parts(lambda part: self._compared(self.sample(part), part), batch)
        return batch.adding(direction=per_sample(self._weight(ratio, batch["t"]), difference) * difference)

    def student_loss(self, batch: Batch, step: int) -> Loss:
        x0 = self.sample(batch)
        direction = batch["direction"] if self.config.weighted else self._compared(x0.detach(), batch)[0]
        divergence = pseudo_target_loss(x0, direction).mean()
        if self.config.gan_weight == 0:
            return Loss(divergence)
        seen = self.teacher.activations(self.noised(x0, batch), batch["t"], batch.condition, features=self.taps)
        gan = generator_loss(self.discriminator(seen, batch["t"])).mean()
        return Loss(divergence + self.config.gan_weight * gan, {"student/divergence": divergence, "student/gan": gan})

    @torch.no_grad()
    def _compared(self, x0: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """mu_q - mu_p, normalised per sample and shaped like x0; where h is not 1, beside it r, float32 (batch,)."""
        x_t = self.noised(x0, batch)
        q = self.critic(x_t, batch["t"], batch.condition)
        p = self.teach(x_t, batch, features=self.taps)
        difference = score_difference(x0, p, q, normalized=self.config.sample_normalization)
        if not self.config.weighted:
            return (difference,)
        return difference, density_ratio(self.discriminator(p, batch["t"]), self.config.ratio_bounds)

    def _weight(self, ratio: Tensor, t: Tensor) -> Tensor:
        """h(r) of the whole batch, float32 (batch,)."""
        config = self.config
        if config.ratio_normalization:
            ratio = ratio / self._level_means(ratio, t)
        weight = F_DIVERGENCES[config.divergence](ratio)
        return weight / self.mean_over_processes(weight.mean()) if config.weight_normalization else weight

    def _level_means(self, ratio: Tensor, t: Tensor) -> Tensor:
        """Running mean of r at each sample's noise level, over all processes; (batch,)."""
        log_snr = self.schedule.log_snr(t).float()
        bins = torch.bucketize(log_snr, self._bin_edges.to(t.device))
        member = nn.functional.one_hot(bins, self.config.ratio_bins).float()
        count = self.mean_over_processes(member.sum(0))
        total = self.mean_over_processes((member * ratio[:, None]).sum(0))
        rate, old = self.config.ratio_ema_rate, self._bin_means.to(t.device)
        new = torch.where(count > 0, rate * old + (1 - rate) * total / count.clamp_min(1e-6), old)
        self._bin_means = new.cpu()
        return new[bins]

    def state(self) -> dict[str, Tensor]:
        return {"bin_means": self._bin_means}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._bin_means = state["bin_means"].clone()
