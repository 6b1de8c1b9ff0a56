"""Discriminator guidance: sampling with a score that a discriminator corrects after training (Kim et al. 2023)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.predictions import Prediction, per_sample, scaled, weighted_sum
from sublimate.diffusion.samplers import Denoise, Noise, heun_step
from sublimate.pipelines.attachments import read_attachment
from sublimate.pipelines.discriminator import Discriminator
from sublimate.pipelines.model import Model

NAME = "discriminator_guidance"
# The paper's clip of the discriminator's probability to [1e-5, 1 - 1e-5], as a bound of the logit.
_ROUNDING = 1e-3  # of a level that is the noisiest
_LOGIT_BOUND = math.log((1 - 1e-5) / 1e-5)


class DiscriminatorGuidance:
    """A discriminator beside a frozen denoiser, and what sampling makes of it (arXiv 2211.17091).

    A discriminator that tells data from the model's own samples at every noise level knows log(p_t/q_t), so that

        grad log p_t(x_t) = s_theta(x_t, t) + grad_x log(D/(1 - D))(x_t, t)                                    (eq. 7)

    is the data's score although the model's is not. Here a multiple w of the correction is added to the prediction at
    a step's start (the predictor) and another at its end (Heun's corrector); the paper's best use none there.

    Args:
        denoiser: the frozen model, whose features the discriminator judges.
        discriminator: trained on data and the model's samples.
        predictor_weight, corrector_weight: w at the start and at the end of a step; 0 costs nothing.
        log_snr_max: cleaner levels are not corrected; 6.2 is the paper's tau = 0.01 of the linear schedule.
        log_snr_min: noisier levels are not corrected, which an export knows nothing of; nor is pure noise.
        boosting: help samples that the discriminator calls fake (appendix): every second step their predictor weight
            doubles, every fifth step they get fresh noise first.
        churn: the paper's S_churn of that noise: the noise level rises by the fraction min(churn/steps, sqrt(2) - 1).
        guidance_scale: of the samples that the discriminator was shown, and so of the sampling it corrects.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        discriminator: Discriminator,
        *,
        predictor_weight: float = 1.0,
        corrector_weight: float = 0.0,
        log_snr_max: float = 6.2,
        log_snr_min: float = -math.inf,
        boosting: bool = False,
        churn: float = 4.0,
        guidance_scale: float = 1.0,
    ) -> None:
        self.denoiser, self.discriminator = denoiser, discriminator
        self.predictor_weight, self.corrector_weight = predictor_weight, corrector_weight
        self.log_snr_max, self.log_snr_min, self.boosting, self.churn = log_snr_max, log_snr_min, boosting, churn
        self.guidance_scale = guidance_scale

    @classmethod
    def load(cls, model: Model, folder: str | Path, **options: Any) -> DiscriminatorGuidance:
        """Opens an exported discriminator for the model it was trained beside.

        Args:
            model: the base.
            folder: what the objective `discriminator_guidance` exported.
            options: changes to what the export records, named as the class's arguments.

        Raises:
            ValueError: when the folder holds something else, or does not fit the model.
        """
        attachment = read_attachment(folder, NAME)
        recorded = dict(attachment.options)
        discriminator = Discriminator(recorded.pop("channels"), recorded.pop("width"), maps=recorded.pop("maps"))
        attachment.load_into(discriminator)
        discriminator.to(model.device).requires_grad_(False).eval()
        return cls(model.denoiser, discriminator, **{**recorded, **options})

    @torch.enable_grad()
    def correction(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """log(D/(1 - D)) (batch,) and its gradient in x_t, shaped like x_t; both float32 and detached.

        One pass through the denoiser and one back to its input.
        """
        x_t = x_t.detach().requires_grad_(True)
        seen = self.denoiser.activations(x_t, t, condition, features=self.discriminator.taps)
        # Several heads are several estimates of one ratio.
        logits = self.discriminator(seen, t).float().mean(1).clamp(-_LOGIT_BOUND, _LOGIT_BOUND)
        (gradient,) = torch.autograd.grad(logits.sum(), x_t)
        return logits.detach(), gradient.float()

    def corrected(
        self, prediction: Prediction, t: Tensor, condition: Condition, weight: float, doubled: bool = False
    ) -> tuple[Prediction, Tensor | None]:
        """The prediction with `weight` times the correction added to its score, and the log ratio where one was taken.

        Args:
            prediction: of the (guided) model at the schedule's time t.
            t: (batch,).
            condition: what the discriminator's features are conditioned on.
            weight: of the correction.
            doubled: double the weight of samples that the discriminator calls fake.
        """
        c = prediction.coefficients
        log_snr = 2 * (c.alpha.log() - c.sigma.log())
        known = (log_snr <= self.log_snr_max) & (log_snr >= self.log_snr_min - _ROUNDING) & log_snr.isfinite()
        used = known.expand(len(prediction.x_t))
        if weight == 0 or not bool(used.any()):
            return prediction, None
        ratio, gradient = self.correction(prediction.x_t, t, condition)
        weights = weight * used.to(gradient.dtype)
        if doubled:
            weights = torch.where(ratio < 0, 2 * weights, weights)
        # The score is -eps / sigma.
        shift = scaled(-c.sigma, per_sample(weights, gradient) * gradient)
        shifted = prediction.shifted(shift.to(prediction.x_t.dtype)).output
        output = torch.where(per_sample(used, shifted), shifted, prediction.output)
        return replace(prediction, output=output), ratio

    def sample(
        self,
        denoise: Denoise,
        z: Tensor,
        condition: Condition,
        times: Sequence[float] | Tensor,
        noise: Noise,
        *,
        sampler: str = "heun",
    ) -> Tensor:
        """Walks down a grid with corrected predictions.

        Args:
            denoise: the model, with condition and guidance chosen.
            z: (batch, ...) N(0, I).
            condition: what the discriminator's features are conditioned on.
            times: (steps + 1,) descending, as `Schedule.grid` makes them.
            noise: fresh noise, used by boosting alone.
            sampler: "heun", or "ddim" with the predictor alone.

        Returns:
            x at the last time, shaped like z.
        """
        schedule = self.denoiser.schedule
        condition = condition.expand(len(z))
        steps = [float(t) for t in times]
        x, verdict = schedule.start_scale(steps[0]) * z, None
        for index, (start, to) in enumerate(itertools.pairwise(steps)):
            t = torch.full((len(x),), start, dtype=torch.float64, device=x.device)
            if self.boosting and verdict is not None and index % 5 == 0:
                x, t = self._churned(x, t, verdict < 0, len(steps) - 1, noise)
            seen: list[Tensor | None] = []

            def predict(x: Tensor, t: Tensor, index: int = index, seen: list[Tensor | None] = seen) -> Prediction:
                doubled = self.boosting and index % 2 == 0
                corrected, ratio = self.corrected(denoise(x, t), t, condition, self.predictor_weight, doubled)
                seen.append(ratio)
                return corrected

            def correct(x: Tensor, t: Tensor) -> Prediction:
                return self.corrected(denoise(x, t), t, condition, self.corrector_weight)[0]

            if sampler == "heun":
                x = heun_step(predict, correct, x, schedule, t, to)
            else:
                c = schedule.at(to)
                x = predict(x, t).combine(c.alpha, c.sigma)
            verdict = seen[0] if seen[0] is not None else verdict
        return x

    def _churned(self, x: Tensor, t: Tensor, rows: Tensor, steps: int, noise: Noise) -> tuple[Tensor, Tensor]:
        """Some samples moved up to (1 + gamma) of their noise level (Karras et al. 2022, algorithm 2)."""
        schedule = self.denoiser.schedule
        gamma = min(self.churn / steps, math.sqrt(2) - 1)
        raised = schedule.t_at_log_snr(schedule.log_snr(t) - 2 * math.log1p(gamma)).clamp(max=schedule.t_max)
        t_hat = torch.where(rows, torch.maximum(raised, t), t)
        c, c_hat = schedule.at(t), schedule.at(t_hat)
        kept = c_hat.alpha / c.alpha
        fresh = (c_hat.sigma**2 - (kept * c.sigma) ** 2).clamp_min(0).sqrt()
        return weighted_sum(kept, x, fresh, noise(x)), t_hat
