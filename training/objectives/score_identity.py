"""SiD: score identity distillation to one step, with an adversarial term as SiDA (Zhou et al. 2024)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from sublimate.diffusion.predictions import Prediction
from sublimate.training.losses import generator_loss, identity_terms
from sublimate.training.matching import Matching, MatchingConfig
from sublimate.training.objective import Batch, Loss
from sublimate.training.players import PlayerConfig


class ScoreIdentityConfig(MatchingConfig):
    """Options of SiD; defaults are those published for CIFAR-10: start sigma 2.5, the Karras curve up to 80 %.

    Attributes:
        alpha: how much of |mu_p - mu_q|^2 is taken off; 1.2 for SiD, 1.0 for SiDA.
        gan_weight: weight of the adversarial term; 0.01 for SiDA, 0 is data-free SiD.
        sample_normalization: divide each sample's loss by mean|x0 - mu_p|.

    The others are `MatchingConfig`'s.
    """

    alpha: float = 1.2
    start_log_snr: float | None = -1.83
    time_range: tuple[float, float] = (0.0, 0.8)
    gan_weight: float = Field(default=0.0, ge=0)
    sample_normalization: bool = True
    student: PlayerConfig = PlayerConfig(adam_weight_decay=0.0)
    critic: PlayerConfig = PlayerConfig(adam_weight_decay=0.0)

    @property
    def adversarial(self) -> bool:
        return self.gan_weight > 0

    def student_passes(self, step: int = 0) -> float:
        # The student forward and backward; critic and teacher forward and back to their input.
        return 3 + 2 * (1 + self.teacher_passes)


class ScoreIdentity(Matching):
    """Descends the model-based explicit score matching E_{q_t}|s_p - s_q|^2 with the score identities put in.

    The critic stands for s_q, but a gradient through it as if it were s_q itself would miss how s_q moves with the
    student. Projecting with E[u(x_t)^T (s_q + eps/sigma)] = 0 gives a second estimate of the same loss, and

        L_alpha = (mu_p - mu_q)^T [(mu_p - x0) - alpha (mu_p - mu_q)]                                        (eq. 23)

    combines both; gradients flow through x0 and, from x_t, through both networks. At alpha = 1/2 its gradient is, up
    to the level's weight alpha_t^2/sigma_t^2, half that of the exact expansion of reverse KL (`uni_instruct`); at
    other alphas it is no divergence's. The difference is second order in mu_p - mu_q, so all of them rest at q = p.

    The adversarial term reads the frozen teacher's features (SiDA, arXiv 2410.14919, takes the critic's).

    Args:
        model: the teacher; stays frozen.
        config: options.
    """

    Config = ScoreIdentityConfig
    paper: ClassVar[str] = "2404.04057"

    def student_loss(self, batch: Batch, step: int) -> Loss:
        x0 = self.sample(batch)
        x_t = self.noised(x0, batch)
        q = self.critic(x_t, batch["t"], batch.condition)
        p = self.teach(x_t, batch, features=self.taps)
        losses = self.losses(x0, p, q)
        if self.config.sample_normalization:
            losses = losses / (x0 - p.x0).detach().float().abs().flatten(1).mean(1).clamp_min(1e-5)
        identity = losses.mean()
        if self.config.gan_weight == 0:
            return Loss(identity)
        # The teacher's features were differentiated already, so this term costs no pass of its own.
        gan = generator_loss(self.discriminator(p, batch["t"])).mean()
        return Loss(identity + self.config.gan_weight * gan, {"student/identity": identity, "student/gan": gan})

    def losses(self, x0: Tensor, p: Prediction, q: Prediction) -> Tensor:
        """L_alpha per sample as a mean over elements; (batch,)."""
        cross, squared = identity_terms(x0, p, q)
        return (cross - self.config.alpha * squared) / x0[0].numel()
