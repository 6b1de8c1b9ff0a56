"""Discriminator guidance: a discriminator trained beside a frozen model corrects its score (Kim et al. 2023)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sublimate.diffusion.predictions import Activations, add_noise
from sublimate.pipelines.discriminator import make_discriminator
from sublimate.pipelines.discriminator_guidance import NAME
from sublimate.training.losses import discriminator_loss
from sublimate.training.objective import Artefact, Batch, Loss, ObjectiveConfig, SoloObjective, Turn
from sublimate.training.players import PlayerConfig, make_player
from sublimate.training.teacher import Teacher, check_guidance, frozen, images_and


class DiscriminatorGuidanceConfig(ObjectiveConfig):
    """Options of the discriminator; defaults are those published for CIFAR-10.

    Attributes:
        guidance_scale: of the model's own samples, and of the sampling to be corrected; 1 is none.
        time_range: noise levels used, as fractions of the schedule's time.
        discriminator_width: hidden width of the heads on the frozen model's features.
        predictor_weight, corrector_weight, log_snr_max, boosting: how sampling uses it, recorded beside the weights
            (see `pipelines.discriminator_guidance.DiscriminatorGuidance`).
        discriminator: how the heads are optimised.
    """

    guidance_scale: float = Field(default=1.0, ge=1)
    time_range: tuple[float, float] = (0.0, 1.0)
    discriminator_width: int = Field(default=256, ge=1)
    predictor_weight: float = Field(default=1.0, ge=0)
    corrector_weight: float = Field(default=0.0, ge=0)
    log_snr_max: float = 6.2
    boosting: bool = False
    discriminator: PlayerConfig = PlayerConfig(learning_rate=3e-4, adam_weight_decay=1e-7)

    def passes(self, step: int = 0) -> float:
        # The frozen model's features of an image and of a sample; no gradient passes through it.
        return 2


class DiscriminatorGuidance(SoloObjective):
    """Minimises int lambda(t) BCE(D(x_t, t); images against the model's own samples) dt (arXiv 2211.17091, eq. 8).

    The weight is lambda = g^2/sigma^2, g the diffusion coefficient. With g^2 = alpha^2 d(sigma^2/alpha^2)/dt it is
    lambda = d/dt log(sigma^2/alpha^2), so times drawn from its density are uniform in log-SNR: the paper's closed form
    d/dt [log(1 - exp(-B)) + B] of the linear schedule is this for alpha^2 = exp(-B), sigma^2 = 1 - exp(-B).

    The discriminator reads the features of the frozen, conditional model. At its optimum the logit is log(p_t/q_t) of
    `images` over `samples`, which show the same prompts.

    Args:
        model: stays frozen; nothing of it trains.
        config: options.
    """

    Config = DiscriminatorGuidanceConfig
    paper: ClassVar[str] = "2211.17091"

    def __init__(self, model: Teacher, config: DiscriminatorGuidanceConfig) -> None:
        self.model, self.taps = frozen(model), model.feature_taps()
        self.schedule, self.shape, self.null = self.model.schedule, tuple(model.latent_shape), model.null_condition()
        check_guidance(self.null, config.guidance_scale)
        judge = make_discriminator(
            self.model, self.taps, self.shape, model.any_condition(), config.discriminator_width
        )
        super().__init__(model, config, "discriminator", make_player(judge, config.discriminator, ema=True))
        ends = self.schedule.uniform_time(torch.tensor((0.0, 1.0), dtype=torch.float64), *config.time_range)
        # A schedule may end in pure noise, where no density is uniform: EDM's noisiest level is far enough.
        found = self.schedule.log_snr(ends)
        self.log_snr_range = torch.where(found.isfinite(), found, -2 * math.log(80)).tolist()

    @property
    def needs(self) -> frozenset[str]:
        return images_and(self.null, "samples")

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        device = batch["images"].device
        clean, noisy = self.log_snr_range
        t = self.schedule.t_at_log_snr(noisy + (clean - noisy) * batch.random.uniform(device))
        noise = {name: batch.random.normal(self.shape, device) for name in ("eps", "eps_samples")}
        return batch.adding(t=t, **noise)

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        judge, t = self.player.module, batch["t"]
        real = judge(self._features(batch["images"], batch["eps"], batch), t)
        fake = judge(self._features(batch["samples"], batch["eps_samples"], batch), t)
        return Loss(discriminator_loss(real, fake).mean())

    @torch.no_grad()
    def _features(self, x0: Tensor, eps: Tensor, batch: Batch) -> Activations:
        x_t = add_noise(self.schedule, x0, eps, batch["t"])
        return self.model.activations(x_t, batch["t"], batch.condition, features=self.taps)

    def exports(self) -> Artefact:
        judge, c = self.player.module, self.config
        options = {
            "channels": judge.channels,
            "maps": judge.maps,
            "width": c.discriminator_width,
            "predictor_weight": c.predictor_weight,
            "corrector_weight": c.corrector_weight,
            "log_snr_max": c.log_snr_max,
            "log_snr_min": min(self.log_snr_range),
            "boosting": c.boosting,
            "guidance_scale": c.guidance_scale,
        }
        return Artefact("attachment", judge, attachment={"name": NAME, "options": options, **_CARD})


_CARD = {
    "summary": "Corrects the base model's score while it samples, towards the data the discriminator was shown.",
    "usage": "from sublimate.pipelines.discriminator_guidance import DiscriminatorGuidance\n"
    "from sublimate.pipelines.generate import generate\n"
    "from sublimate.pipelines.model import open_model\n\n"
    'model = open_model("path/to/the/base/model")\n'
    'guidance = DiscriminatorGuidance.load(model, "path/to/this/folder")\n'
    'images = generate(model, ["..."], discriminator=guidance)',
}
