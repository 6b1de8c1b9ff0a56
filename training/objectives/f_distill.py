"""f-distill: one-step distillation by any f-divergence; reverse KL is DMD2 (Xu, Nie & Vahdat 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.predictions import add_noise, per_sample
from sublimate.training.discriminator import make_discriminator
from sublimate.training.losses import (
    F_DIVERGENCES,
    discriminator_loss,
    generator_loss,
    pseudo_target_loss,
)
from sublimate.training.objective import Artefact, Batch, Loss, Objective, ObjectiveConfig, Turn
from sublimate.training.players import Player, PlayerConfig, make_player

Divergence = Literal[
    "reverse_kl",
    "forward_kl",
    "jensen_shannon",
    "softened_reverse_kl",
    "squared_hellinger",
    "jeffreys",
    "neyman",
    "pearson",
]


class Teacher(Protocol):
    """What the objective reads of a model."""

    denoiser: Denoiser

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    def null_condition(self) -> Condition: ...

    def feature_taps(self) -> tuple[str, ...]: ...


class FDistillConfig(ObjectiveConfig):
    """Options of f-distill; defaults are those published for Stable Diffusion 1.5.

    Attributes:
        divergence: which D_f(teacher || student) to minimise.
        guidance_scale: the teacher's guidance; 1 is none.
        gan_weight: weight of the adversarial term; 0 leaves it out.
        critic_updates: critic (and discriminator) updates per student update.
        time_range: noise levels used, as fractions of the schedule's time.
        ratio_bounds: clamp of the density ratio r; None leaves it free.
        ratio_normalization: divide r by its running mean at similar log-SNR, because E_q[r] = 1 at every level.
        ratio_bins: bins of equal width in log-SNR for that mean.
        ratio_ema_rate: how much of the running mean is kept per update; 0 uses the current batch alone.
        weight_normalization: divide h(r) by its batch mean.
        sample_normalization: divide each sample's gradient by mean|x0 - mu_p|, DMD's weight (DMD2, eq. 8 of DMD).
        discriminator_width: hidden width of the discriminator's heads.
        student, critic, discriminator: how each player is made and optimised.
    """

    divergence: Divergence = "jensen_shannon"
    guidance_scale: float = Field(default=1.75, ge=1)
    gan_weight: float = Field(default=1e-3, ge=0)
    critic_updates: int = Field(default=9, ge=1)
    time_range: tuple[float, float] = (0.02, 0.98)
    ratio_bounds: tuple[float, float] | None = (0.1, 20.0)
    ratio_normalization: bool = True
    ratio_bins: int = Field(default=10, ge=1)
    ratio_ema_rate: float = Field(default=0.0, ge=0, lt=1)
    weight_normalization: bool = True
    sample_normalization: bool = True
    discriminator_width: int = Field(default=256, ge=1)
    student: PlayerConfig = PlayerConfig()
    critic: PlayerConfig = PlayerConfig()
    discriminator: PlayerConfig = PlayerConfig()

    @property
    def adversarial(self) -> bool:
        """Whether a discriminator, and with it a real class of images, takes part."""
        return self.divergence != "reverse_kl" or self.gan_weight > 0

    def passes(self) -> float:
        teacher = 1 if self.guidance_scale == 1 else 2
        critic_turn = 1 + 3 + 2 * self.adversarial
        student_turn = (1 + 1 + teacher) + 3 + 2 * (self.gan_weight > 0)
        return self.critic_updates * critic_turn + student_turn


class FDistill(Objective):
    """Minimises E_t[w_t D_f(p_t || q_t)] between the teacher's and the one-step student's noised distributions.

    The student maps x_T = noise_scale * z to x0 = mu_theta(x_T, T, c). With r = p_t/q_t and h(r) = f''(r) r^2,

        grad D_f(p_t || q_t) = E_{z,eps}[ -h(r(x_t)) (s_p(x_t) - s_q(x_t))^T alpha_t dx0/dtheta ]        (Theorem 1)

    s_p is the (guided) teacher's score, s_q that of a critic trained on the student's samples, and r comes from a
    discriminator on the frozen teacher's features. Reverse KL has h = 1: no ratio is needed, and without the
    adversarial term no data either.

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
        self.teacher = model.denoiser.requires_grad_(False).eval()
        self.schedule = self.teacher.schedule
        self.shape = tuple(model.latent_shape)
        self.null = model.null_condition()
        if not self.null and config.guidance_scale != 1:
            raise ValueError(
                f"objective.guidance_scale is {config.guidance_scale}, but the teacher is unconditional: set it to 1."
            )
        self._players = {
            "student": make_player(self.teacher, config.student, ema=True),
            "critic": make_player(self.teacher, config.critic),
        }
        self.taps: tuple[str, ...] = ()
        if config.adversarial:
            self.taps = model.feature_taps()
            judge = make_discriminator(self.teacher, self.taps, self.shape, self.null, config.discriminator_width)
            self._players["discriminator"] = make_player(judge, config.discriminator)
        # Log-SNR falls with t, so the first bin is the noisiest level used.
        ends = self.schedule.log_snr(self.schedule.uniform_time(torch.tensor(config.time_range).flip(0).double()))
        self._bin_edges = torch.linspace(float(ends[0]), float(ends[1]), config.ratio_bins + 1)[1:-1]
        self._bin_means = torch.ones(config.ratio_bins)

    @property
    def needs(self) -> frozenset[str]:
        prompts = {"prompts"} if self.null else set()
        return frozenset(prompts | {"images"} if self.taps else prompts)

    def players(self) -> dict[str, Player]:
        return self._players

    @property
    def student(self) -> nn.Module:
        return self._players["student"].module

    @property
    def critic(self) -> nn.Module:
        return self._players["critic"].module

    def discriminator(self) -> nn.Module:
        return self._players["discriminator"].module

    def turns(self, step: int) -> tuple[Turn, ...]:
        trains = tuple(name for name in ("critic", "discriminator") if name in self._players)
        critics = tuple(Turn(f"critic{i}", trains) for i in range(self.config.critic_updates))
        return (*critics, Turn("student", ("student",)))

    # The student's turn.

    def generate(self, z: Tensor, condition: Condition) -> Tensor:
        """The student's samples x0 from z ~ N(0, I), both (batch, ...)."""
        return self.student(self.schedule.noise_scale * z, self.schedule.t_max, condition).x0

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        batch = self._draw(batch)
        x0 = self.generate(batch["z"], batch.condition)
        if turn.name != "student":
            return batch.adding(x0=x0)
        x_t = add_noise(self.schedule, x0, batch["eps"], batch["t"])
        q = self.critic(x_t, batch["t"], batch.condition)
        p = guided(
            self.teacher, x_t, batch["t"], batch.condition, self.null, self.config.guidance_scale, features=self.taps
        )
        weight = self._weight(p, batch["t"])
        if self.config.sample_normalization:
            weight = weight / (x0 - p.x0).float().abs().flatten(1).mean(1).clamp_min(1e-6)
        return batch.adding(direction=per_sample(weight, x0) * (q.x0 - p.x0).float())

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        return self._student_loss(batch) if turn.name == "student" else self._critic_loss(batch)

    def _student_loss(self, batch: Batch) -> Loss:
        x0 = self.generate(batch["z"], batch.condition)
        divergence = pseudo_target_loss(x0, batch["direction"]).mean()
        if self.config.gan_weight == 0:
            return Loss(divergence)
        x_t = add_noise(self.schedule, x0, batch["eps"], batch["t"])
        gan = generator_loss(self._logits(x_t, batch["t"], batch.condition)).mean()
        return Loss(divergence + self.config.gan_weight * gan, {"student/divergence": divergence, "student/gan": gan})

    def _weight(self, prediction: object, t: Tensor) -> Tensor:
        """h(r) per sample, float32 (batch,)."""
        config = self.config
        if config.divergence == "reverse_kl":
            return torch.ones(len(t), device=t.device)
        logits = self.discriminator()(prediction, t).float().mean(1)
        ratio = logits.clamp(-10, 10).exp()
        if config.ratio_bounds is not None:
            ratio = ratio.clamp(*config.ratio_bounds)
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

    # The critic's turn.

    def _critic_loss(self, batch: Batch) -> Loss:
        """Denoising score matching on the student's samples, and the discriminator's loss beside it."""
        x_t = add_noise(self.schedule, batch["x0"], batch["eps"], batch["t"])
        prediction = self.critic(x_t, batch["t"], batch.condition)
        target = self.teacher.parametrization.target(batch["x0"], batch["eps"], self.schedule.at(batch["t"]))
        denoising = (prediction.output.float() - target.float()).square().mean()
        if "discriminator" not in self._players:
            return Loss(denoising)
        with torch.no_grad():
            fake = self.teacher(x_t, batch["t"], batch.condition, features=self.taps)
            x_t = add_noise(self.schedule, batch["images"], batch["eps_real"], batch["t"])
            real = self.teacher(x_t, batch["t"], batch.condition, features=self.taps)
        judge = self.discriminator()
        gan = discriminator_loss(judge(real, batch["t"]), judge(fake, batch["t"])).mean()
        return Loss(denoising + gan, {"critic/denoising": denoising, "critic/discriminator": gan})

    def _logits(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.discriminator()(self.teacher(x_t, t, condition, features=self.taps), t)

    def _draw(self, batch: Batch) -> Batch:
        device = next(self.teacher.parameters()).device
        low, high = self.config.time_range
        u = low + (high - low) * batch.random.uniform(device)
        noise = {name: batch.random.normal(self.shape, device) for name in ("z", "eps", "eps_real")}
        return batch.adding(t=self.schedule.uniform_time(u), **noise)

    def state(self) -> dict[str, Tensor]:
        return {"bin_means": self._bin_means}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._bin_means = state["bin_means"].clone()

    def exports(self) -> Artefact:
        kind: Literal["weights", "lora"] = "weights" if self.config.student.kind == "full" else "lora"
        return Artefact(kind, self.student, self.schedule.t_max)
