"""SiD: score identity distillation to one step, with an adversarial term as SiDA (Zhou et al. 2024)."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from sublimate.diffusion.predictions import Prediction
from sublimate.training.losses import distance_to_teacher, generator_loss, identity_terms
from sublimate.training.matching import AdversarialConfig, Matching
from sublimate.training.objective import Batch, Loss
from sublimate.training.players import WITHOUT_MOMENTUM, PlayerConfig


class ScoreIdentityConfig(AdversarialConfig):
    """Options of SiD; defaults are those published for CIFAR-10: start sigma 2.5, the Karras curve up to 80 %.

    Attributes:
        alpha: how much of |mu_p - mu_q|^2 is taken off; None is the published 1.2, or 1 with the adversarial term.
        gan_weight: weight of the adversarial term; SiDA's is 1e-4 (0.01 beside 100 for the identity), 0 is data-free.
        sample_normalization: divide each sample's loss, adversarial term included, by mean|x0 - mu_p|.

    The others are `AdversarialConfig`'s and `MatchingConfig`'s.
    """

    alpha: float | None = None
    start_log_snr: float | None = -2 * math.log(2.5)
    time_range: tuple[float, float] = (0.0, 0.8)
    gan_weight: float = Field(default=0.0, ge=0)
    sample_normalization: bool = True
    student: PlayerConfig = WITHOUT_MOMENTUM
    critic: PlayerConfig = WITHOUT_MOMENTUM
    discriminator: PlayerConfig = WITHOUT_MOMENTUM

    @property
    def adversarial(self) -> bool:
        return self.gan_weight > 0

    @property
    def correction(self) -> float:
        """The alpha in use."""
        if self.alpha is not None:
            return self.alpha
        return 1.0 if self.adversarial else 1.2

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
        scale = 1 / distance_to_teacher(x0, p) if self.config.sample_normalization else 1.0
        identity = (scale * self.identity(x0, p, q)).mean()
        if self.config.gan_weight == 0:
            return Loss(identity)
        # The teacher's features were differentiated already, so this term costs no pass of its own.
        gan = (scale * generator_loss(self.discriminator(p, batch["t"]))).mean()
        return Loss(identity + self.config.gan_weight * gan, {"student/identity": identity, "student/gan": gan})

    def identity(self, x0: Tensor, p: Prediction, q: Prediction) -> Tensor:
        """L_alpha per sample as a mean over elements; (batch,)."""
        cross, squared = identity_terms(x0, p, q)
        return (cross - self.config.correction * squared) / x0[0].numel()
