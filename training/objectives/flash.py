"""Flash Diffusion: few-step distillation from the teacher's multi-step samples, with phases (Chadebec et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from sublimate.diffusion.guidance import guided
from sublimate.diffusion.predictions import Prediction, add_noise
from sublimate.diffusion.samplers import ddim
from sublimate.pipelines.discriminator import make_discriminator
from sublimate.pipelines.few_steps import FewSteps
from sublimate.training.losses import pseudo_target_loss, score_difference, squared_loss
from sublimate.training.objective import Artefact, Batch, Loss, Objective, ObjectiveConfig, Turn
from sublimate.training.players import Player, PlayerConfig, make_player
from sublimate.training.randomness import key
from sublimate.training.teacher import Scales, Teacher, check_guidance, frozen, images_and, scales_from

Weights = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]
Phases = Annotated[tuple[Weights, ...], Field(min_length=1)]
Extractor = Callable[[Tensor], Sequence[Tensor]]
"""Images (batch, channels, height, width) in [0, 1] -> features, each (batch, ...); differentiable."""


class FlashConfig(ObjectiveConfig):
    """Options of Flash Diffusion; defaults are those published for Stable Diffusion 1.5.

    Attributes:
        teacher_steps: K, times of the teacher's grid.
        start: how the student's time on that grid is drawn: the paper's mixture, "uniform", or one "gaussian" in its
            middle.
        mode_weights: per phase, the weights of the mixture's modes, from the noisiest on.
        mode_variance: of each mode, in grid places.
        phase_steps: training steps of a phase; the last lasts.
        guidance_range: from which the teacher's guidance scale is drawn for each sample; 1 is none.
        distance: between the student's x0 and the teacher's sample: of latents ("l2", "l1"), of the frozen teacher's
            own features ("features"), or of what an extractor sees in decoded images ("perceptual").
        feature_time: noise level of those features, as a fraction of the schedule's time.
        crop: side, in latents, of the images' centre that an extractor sees.
        distill_weight: of that distance.
        dmd_weights, adversarial_weights: of the two other terms, per phase; a term of weight 0 costs nothing.
        discriminator_levels: noise levels of the discriminator, as fractions of the schedule's time.
        discriminator_width: hidden width of its heads on the teacher's features.
        sampling_steps: the exported student's.
        seed: of the draw that all samples of a step share.
        student, discriminator: how each player is made and optimised.
    """

    teacher_steps: int = Field(default=32, ge=1)
    start: Literal["mixture", "uniform", "gaussian"] = "mixture"
    mode_weights: Phases = ((0, 0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3), (0.25,) * 4, (0.4, 0.2, 0.2, 0.2))
    mode_variance: float = Field(default=0.5, gt=0)
    phase_steps: int = Field(default=5000, ge=1)
    guidance_range: Annotated[tuple[float, float], scales_from(0)] = (3.0, 13.0)
    distance: Literal["l2", "l1", "features", "perceptual"] = "l2"
    feature_time: float = Field(default=0.05, ge=0, le=1)
    crop: int = Field(default=64, ge=1)
    distill_weight: float = Field(default=1.0, gt=0)
    dmd_weights: Weights = (0.0, 0.3, 0.5, 0.7)
    adversarial_weights: Weights = (0.0, 0.1, 0.2, 0.3)
    discriminator_levels: Weights = (0.01, 0.25, 0.5, 0.75)
    discriminator_width: int = Field(default=256, ge=1)
    sampling_steps: int = Field(default=4, ge=1)
    seed: int = Field(default=0, ge=0)
    student: PlayerConfig = PlayerConfig(kind="lora", rank=128)
    discriminator: PlayerConfig = PlayerConfig()

    @field_validator("mode_weights")
    @classmethod
    def _distributions(cls, phases: Phases) -> Phases:
        if not all(map(any, phases)):
            raise ValueError(f"Every phase needs mode weights that are not all 0, not {phases}.")
        return phases

    def phases(self) -> tuple[int, ...]:
        mixture = len(self.mode_weights) if self.start == "mixture" else 1
        several = max(mixture, len(self.dmd_weights), len(self.adversarial_weights))
        return tuple(self.phase_steps * i for i in range(several))

    def weight(self, weights: Weights, step: int) -> float:
        """The weight of a term in the step's phase."""
        return weights[min(step // self.phase_steps, len(weights) - 1)]

    def start_probabilities(self, step: int) -> Tensor:
        """pi, the distribution of the student's place on the grid of K times, noisiest first; float64 (K,).

        The mixture is sum_j m_j N(i; j K/J, variance) with the weights m of the step's phase (section 3.2); the
        public code leaves out the density's 1/2, which halves the variance.
        """
        places = torch.arange(self.teacher_steps, dtype=torch.float64)
        if self.start == "uniform":
            density = torch.ones_like(places)
        elif self.start == "gaussian":
            density = torch.exp(-((places - self.teacher_steps / 2) ** 2) / self.teacher_steps)
        else:
            weights = self.mode_weights[min(step // self.phase_steps, len(self.mode_weights) - 1)]
            centres = torch.arange(len(weights), dtype=torch.float64) * (self.teacher_steps // len(weights))
            modes = torch.exp(-((places - centres[:, None]) ** 2) / (2 * self.mode_variance))
            density = torch.tensor(weights, dtype=torch.float64) @ modes
        return density / density.sum()

    def place(self, step: int) -> int:
        """The student's place on the grid in a step: the same for all samples, processes and restarts."""
        generator = torch.Generator().manual_seed(key("flash", self.seed, step))
        return int(torch.multinomial(self.start_probabilities(step), 1, generator=generator))

    def passes(self, step: int = 0) -> float:
        teacher = self.guided_passes(Scales(*self.guidance_range).guided)
        # The teacher's remaining steps, the student forward and backward.
        total = teacher * (self.teacher_steps - self.place(step)) + 3.0 + 3 * (self.distance == "features")
        total += (teacher + 1) * (self.weight(self.dmd_weights, step) > 0)
        # Features of the student's sample, differentiable; the discriminator's turn makes one and judges two.
        return total + (2 + 1 + 2) * (self.weight(self.adversarial_weights, step) > 0)


class Flash(Objective):
    """Trains f(x_t, t, c) = x0 to be where the guided teacher would end, from any of a few times (arXiv 2406.02347).

        L = d(f(x_t), Psi(x_t)) + lambda_dmd L_dmd + lambda_adv L_adv                                          (eq. 10)

    Psi solves the teacher's ODE from x_t to clean data over the remaining times of its grid. The student's time comes
    from a mixture whose modes move from little noise to pure noise as the phases go on; at the noisiest time x_t is
    pure noise, at others a noised image. L_dmd is distribution matching with the student itself as its own critic, and
    matches no divergence exactly; L_adv the least-squares GAN on the frozen teacher's features, images against the
    student's x0. A training step has a discriminator's turn, where the GAN takes part, and a student's.

    f is the network's own x0, which is x_t at clean data for every parametrization; the public code's c_skip and c_out
    differ from 0 and 1 by less than 3e-6 at the times of its grid.

    Args:
        model: the teacher; stays frozen.
        config: options.
        extractor: features of decoded images for the "perceptual" distance; any differentiable function.

    Raises:
        ValueError: when distance and extractor do not go together, or for guidance of an unconditional teacher.
    """

    Config = FlashConfig
    paper: ClassVar[str] = "2406.02347"

    def __init__(self, model: Teacher, config: FlashConfig, extractor: Extractor | None = None) -> None:
        super().__init__(model, config)
        if (config.distance == "perceptual") != (extractor is not None):
            raise ValueError("Only the perceptual distance has an extractor: pass it in Python, or choose `features`.")
        self.teacher, self.taps = frozen(model), model.feature_taps()
        self.schedule, self.shape, self.null = self.teacher.schedule, tuple(model.latent_shape), model.null_condition()
        check_guidance(self.null, *config.guidance_range, option="guidance_range")
        self.model: Any = model
        self.extractor, self.grid = extractor, self.schedule.grid(config.teacher_steps)
        self._players = {"student": make_player(self.teacher, config.student, ema=True)}
        if any(config.adversarial_weights):
            judge = make_discriminator(
                self.teacher, self.taps, self.shape, model.any_condition(), config.discriminator_width
            )
            self._players["discriminator"] = make_player(judge, config.discriminator)

    @property
    def needs(self) -> frozenset[str]:
        return images_and(self.null)

    def players(self) -> dict[str, Player]:
        return self._players

    @property
    def student(self) -> torch.nn.Module:
        return self._players["student"].module

    def turns(self, step: int) -> tuple[Turn, ...]:
        student = Turn("student", ("student",))
        if not self.config.weight(self.config.adversarial_weights, step):
            return (student,)
        return (Turn("discriminator", ("discriminator",)), student)

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        c, device = self.config, batch["images"].device
        place = c.place(step)
        t = self.grid[place].to(device).expand(len(batch))
        names = ("eps", "eps_real", "eps_fake")
        batch = batch.adding(t=t, **{name: batch.random.normal(self.shape, device) for name in names})
        x_t = self.schedule.noise_scale * batch["eps"]
        if place > 0:
            x_t = add_noise(self.schedule, batch["images"], batch["eps"], t)
        # Fake and real samples are judged, and matched, at times of their own.
        levels = torch.tensor(c.discriminator_levels, dtype=torch.float64, device=device)
        judged = self.schedule.uniform_time(levels[batch.random.integers(len(levels), device)])
        matched = self.schedule.uniform_time(batch.random.uniform(device))
        batch = Scales(*c.guidance_range).drawn(batch.adding(x_t=x_t, judged=judged, matched=matched), device)
        if turn.name == "discriminator":
            (x0,) = self.in_parts(lambda part: (self.student(part["x_t"], part["t"], part.condition).x0,), batch)
            return batch.adding(x0=x0)
        (target,) = self.in_parts(lambda part: (self._sampled(part, self.grid[place:]),), batch)
        return batch.adding(target=target)

    def _sampled(self, batch: Batch, times: Tensor) -> Tensor:
        """What the guided teacher makes of the batch's x_t in the steps between times."""
        return ddim(lambda x_t, t: self._teach(x_t, t, batch), batch["x_t"], self.schedule, times)

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        weights = self.config.weight(self.config.adversarial_weights, step)
        if turn.name == "discriminator":
            fake = self._logits(batch["x0"], batch["eps_fake"], batch)
            real = self._logits(batch["images"], batch["eps_real"], batch)
            return Loss(0.5 * (fake.sigmoid().square() + (1 - real.sigmoid()).square()).mean())
        x0 = self.student(batch["x_t"], batch["t"], batch.condition).x0
        distance = self._distance(x0, batch["target"], batch).mean()
        terms = {"student/distill": self.config.distill_weight * distance}
        if weight := self.config.weight(self.config.dmd_weights, step):
            terms["student/dmd"] = weight * self._matching(x0, batch).mean()
        if weights:
            logits = self._logits(x0, batch["eps_fake"], batch)
            terms["student/adversarial"] = weights * (1 - logits.sigmoid()).square().mean()
        return Loss(torch.stack(list(terms.values())).sum(), terms)

    def _teach(self, x_t: Tensor, t: Tensor, batch: Batch) -> Prediction:
        scale = Scales(*self.config.guidance_range).in_batch(batch)
        return guided(self.teacher, x_t, t, batch.condition, self.null, scale)

    def _distance(self, x0: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """(batch,)"""
        if self.config.distance == "l1":
            return (x0 - target).float().abs().flatten(1).mean(1)
        if self.config.distance == "l2":
            return squared_loss(x0, target)
        ours, theirs = self._features(x0, batch), self._features(target, batch)
        return torch.stack([squared_loss(a, b) for a, b in zip(ours, theirs, strict=True)]).sum(0)

    def _features(self, x0: Tensor, batch: Batch) -> list[Tensor]:
        if self.extractor is not None:
            for axis, size in enumerate(x0.shape[2:], 2):
                side = min(size, self.config.crop)
                x0 = x0.narrow(axis, (size - side) // 2, side)
            return list(self.extractor(self.model.render(x0)))
        t = self.schedule.uniform_time(torch.full((len(x0),), self.config.feature_time, device=x0.device))
        x_t = add_noise(self.schedule, x0, batch["eps_real"], t)
        found = self.teacher.activations(x_t, t, batch.condition, features=self.taps).features
        return [found[tap] for tap in self.taps]

    def _matching(self, x0: Tensor, batch: Batch) -> Tensor:
        """|x0 - sg[x0 - w (mu_student - mu_p)]|^2, twice `pseudo_target_loss`; (batch,)."""
        with torch.no_grad():
            x_t = add_noise(self.schedule, x0, batch["eps_real"], batch["matched"])
            p = self._teach(x_t, batch["matched"], batch)
            q = self.student(x_t, batch["matched"], batch.condition)
            direction = score_difference(x0, p, q, normalized=True)
        return 2 * pseudo_target_loss(x0, direction)

    def _logits(self, x0: Tensor, eps: Tensor, batch: Batch) -> Tensor:
        x_t = add_noise(self.schedule, x0, eps, batch["judged"])
        seen = self.teacher.activations(x_t, batch["judged"], batch.condition, features=self.taps)
        return self._players["discriminator"].module(seen, batch["judged"]).float()

    def exports(self) -> Artefact:
        few = FewSteps("consistency", steps=self.config.sampling_steps)
        return Artefact(self.config.student.artefact, self.student, few_steps=few)
