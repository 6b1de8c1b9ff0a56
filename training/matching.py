"""Distribution matching: the shape of every objective whose student, of one step or few, faces a critic."""

from __future__ import annotations

from abc import abstractmethod
from itertools import pairwise
from typing import ClassVar, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.predictions import Prediction, add_noise
from sublimate.pipelines.discriminator import make_discriminator
from sublimate.pipelines.few_steps import FewSteps
from sublimate.training.losses import denoising_loss, discriminator_loss
from sublimate.training.objective import Artefact, Batch, Loss, Objective, ObjectiveConfig, Turn
from sublimate.training.players import Player, PlayerConfig, make_player
from sublimate.training.randomness import key
from sublimate.training.teacher import Teacher, check_guidance, frozen

STUDENT = "student"


class MatchingConfig(ObjectiveConfig):
    """Options of distribution matching.

    Attributes:
        guidance_scale: the teacher's guidance; 1 is none.
        start_log_snr: log(alpha^2/sigma^2) of the level at which the student is given pure noise; None is the
            schedule's end.
        sampling_steps: network calls of the student. Beyond one it is trained at all of its times, on what its own
            earlier calls make there (DMD2, section 4.5).
        critic_updates: critic (and discriminator) updates per student update.
        time_range: noise levels used, as fractions of the schedule's time.
        student, critic: how each player is made and optimised.
    """

    guidance_scale: float = Field(default=1.0, ge=1)
    start_log_snr: float | None = None
    sampling_steps: int = Field(default=1, ge=1)
    critic_updates: int = Field(default=1, ge=1)
    time_range: tuple[float, float] = (0.02, 0.98)
    student: PlayerConfig = PlayerConfig()
    critic: PlayerConfig = PlayerConfig()

    @model_validator(mode="after")
    def _starts_at_the_end(self) -> Self:
        if self.sampling_steps > 1 and self.start_log_snr is not None:
            raise ValueError("A student of several steps starts at the schedule's end: set start_log_snr to null.")
        return self

    @property
    def adversarial(self) -> bool:
        """Whether a discriminator, and with it a real class of images, takes part."""
        return False

    @property
    def teacher_passes(self) -> int:
        """Network passes of one guided prediction."""
        return self.guided_passes(self.guidance_scale != 1)

    def place(self, step: int, turn: str) -> int:
        """The student's call that a turn trains, from 0: the same for all samples, seeds, processes and restarts."""
        generator = torch.Generator().manual_seed(key("matching", step, turn))
        return int(torch.randint(self.sampling_steps, (1,), generator=generator))

    def passes(self, step: int = 0) -> float:
        # The sample, the critic's update, and the teacher's features of a real and a generated sample; the student's
        # earlier calls.
        critic_turn = 1 + 3 + 2 * self.adversarial
        earlier = sum(self.place(step, turn) for turn in (*critic_turns(self.critic_updates), STUDENT))
        return self.critic_updates * critic_turn + self.student_passes(step) + earlier

    @abstractmethod
    def student_passes(self, step: int = 0) -> float:
        """Network passes per sample of the student's turn, counted as in `passes`."""


def critic_turns(count: int) -> tuple[str, ...]:
    """Names of the critic's turns in a step."""
    return tuple(f"critic{i}" for i in range(count))


class AdversarialConfig(MatchingConfig):
    """Options of distribution matching with a discriminator, which takes part where `adversarial` says so.

    Attributes:
        discriminator_width: hidden width of the discriminator's heads.
        discriminator: how the discriminator is made and optimised.

    The others are `MatchingConfig`'s.
    """

    discriminator_width: int = Field(default=256, ge=1)
    discriminator: PlayerConfig = PlayerConfig()


class Matching(Objective):
    """Brings the distribution of x0 = mu_theta(start_scale z, t_start, c), z ~ N(0, I), towards the teacher's.

    A student of N steps has N times t_0 = t_start > t_1 > ..., and goes to x0 and back with fresh noise between them
    (consistency sampling). A turn trains one of its calls, x0 = mu_theta(x_i, t_i, c), where x_i is what its own calls
    before that make (backward simulation), without gradients, and not noised data, which it never sees when it draws.

    A step has `critic_updates` critic turns and one student turn. In a critic's turn the critic learns to denoise the
    student's samples (its score is then s_q), and the discriminator, where there is one, to tell the `images` from
    them on the frozen teacher's features; its logit estimates log(p_t/q_t) of the images it is shown. What the student
    minimises is the objective's own: `student_loss`, after `prepare_student` where samples are coupled.

    Both see the batch with the draws `z`, `eps` (batch, *latent_shape) and `t` (batch,), the teacher as `self.teach`
    (guided) or `self.teacher` (plain), and the players as `self.student`, `self.critic` and `self.discriminator`.

    Args:
        model: the teacher; stays frozen.
        config: options.
    """

    Config: ClassVar[type[MatchingConfig]]  # type: ignore[assignment]

    def __init__(self, model: Teacher, config: MatchingConfig) -> None:
        super().__init__(model, config)
        self.teacher = frozen(model)
        self.schedule = self.teacher.schedule
        self.shape, self.null = tuple(model.latent_shape), model.null_condition()
        check_guidance(self.null, config.guidance_scale)
        start = config.start_log_snr
        self.start = self.schedule.t_max if start is None else self.schedule.callable_time(start)
        steps = config.sampling_steps
        self.few_steps = FewSteps("consistency", steps=steps, grid_steps=steps) if steps > 1 else None
        self.times = (self.start,) if self.few_steps is None else self.few_steps.call_times(self.schedule)
        self.taps = model.feature_taps() if config.adversarial else ()
        self._players = {
            STUDENT: make_player(self.teacher, config.student, ema=True),
            "critic": make_player(self.teacher, config.critic),
        }
        if isinstance(config, AdversarialConfig) and config.adversarial:
            judge = make_discriminator(
                self.teacher, self.taps, self.shape, model.any_condition(), config.discriminator_width
            )
            self._players["discriminator"] = make_player(judge, config.discriminator)

    @property
    def needs(self) -> frozenset[str]:
        wanted = {"prompts": bool(self.null), "images": "discriminator" in self._players}
        return frozenset(name for name, present in wanted.items() if present)

    def players(self) -> dict[str, Player]:
        return self._players

    @property
    def student(self) -> Denoiser:
        return cast(Denoiser, self._players[STUDENT].module)

    @property
    def critic(self) -> Denoiser:
        return cast(Denoiser, self._players["critic"].module)

    @property
    def discriminator(self) -> nn.Module:
        return self._players["discriminator"].module

    def turns(self, step: int) -> tuple[Turn, ...]:
        trains = tuple(name for name in self._players if name != STUDENT)
        first, *more = critic_turns(self.config.critic_updates)
        like = first if self.few_steps is None else None  # which calls a turn makes, is drawn
        return (Turn(first, trains), *(Turn(name, trains, like=like) for name in more), Turn(STUDENT, (STUDENT,)))

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        batch = self.draw(batch)
        if self.few_steps is not None:
            place = self.config.place(step, turn.name)
            (reached,) = self.in_parts(lambda part: (self._reached(part, place),), batch)
            t = torch.full((len(batch),), self.times[place], dtype=torch.float64, device=reached.device)
            batch = batch.adding(reached=reached, reached_t=t)
        if turn.name == STUDENT:
            return self.prepare_student(batch, step)
        (x0,) = self.in_parts(lambda part: (self.sample(part),), batch)
        return batch.adding(x0=x0)

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        return self.student_loss(batch, step) if turn.name == STUDENT else self.critic_loss(batch)

    def prepare_student(self, batch: Batch, step: int) -> Batch:
        """Decides on the whole batch, without gradients, what couples the samples of the student's turn."""
        return batch

    @abstractmethod
    def student_loss(self, batch: Batch, step: int) -> Loss:
        """What the student minimises, on a micro-batch."""

    def critic_loss(self, batch: Batch) -> Loss:
        """Denoising score matching on the student's samples `x0`, and the discriminator's loss beside it."""
        x_t = self.noised(batch["x0"], batch)
        prediction = self.critic(x_t, batch["t"], batch.condition)
        denoising = denoising_loss(prediction, batch["x0"], batch["eps"]).mean()
        if "discriminator" not in self._players:
            return Loss(denoising)
        with torch.no_grad():
            fake = self.teacher.activations(x_t, batch["t"], batch.condition, features=self.taps)
            x_t = add_noise(self.schedule, batch["images"], batch["eps_real"], batch["t"])
            real = self.teacher.activations(x_t, batch["t"], batch.condition, features=self.taps)
        judge = self.discriminator
        gan = discriminator_loss(judge(real, batch["t"]), judge(fake, batch["t"])).mean()
        return Loss(denoising + gan, {"critic/denoising": denoising, "critic/discriminator": gan})

    def generate(self, z: Tensor, condition: Condition) -> Tensor:
        """The student's samples x0 from z ~ N(0, I), both (batch, *latent_shape)."""
        return self.student(self.schedule.start_scale(self.start) * z, self.start, condition).x0

    def sample(self, batch: Batch) -> Tensor:
        """The student's samples x0 of a batch's draws, by the call that the turn trains."""
        if self.few_steps is None:
            return self.generate(batch["z"], self.told(batch))
        return self.student(batch["reached"], batch["reached_t"], self.told(batch)).x0

    def _reached(self, batch: Batch, place: int) -> Tensor:
        """What the student's earlier calls make of z, with noise up to the time of its call `place`."""
        told, x_t = self.told(batch), self.schedule.start_scale(self.start) * batch["z"]
        for t, s in pairwise(self.times[: place + 1]):
            x0 = self.student(x_t, t, told).x0
            x_t = add_noise(self.schedule, x0, batch.random.normal(self.shape, x0.device), s)
        return x_t

    def told(self, batch: Batch) -> Condition:
        """What the student is told."""
        return batch.condition

    def noised(self, x0: Tensor, batch: Batch) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps with the batch's draws."""
        return add_noise(self.schedule, x0, batch["eps"], batch["t"])

    def teach(self, x_t: Tensor, batch: Batch, *, features: tuple[str, ...] = ()) -> Prediction:
        """The guided teacher's prediction at the batch's times."""
        scale = self.config.guidance_scale
        return guided(self.teacher, x_t, batch["t"], batch.condition, self.null, scale, features=features)

    def draw(self, batch: Batch) -> Batch:
        """The random numbers of a turn: z, eps, t, and eps_real for the discriminator's real samples."""
        device = next(self.student.parameters()).device
        low, high = self.config.time_range
        t = self.schedule.uniform_time(batch.random.uniform(device), low, high)
        names = ("z", "eps", "eps_real") if "discriminator" in self._players else ("z", "eps")
        return batch.adding(t=t, **{name: batch.random.normal(self.shape, device) for name in names})

    def exports(self) -> Artefact:
        start = self.start if self.few_steps is None else None
        return Artefact(self.config.student.artefact, self.student, start, self.few_steps)
