"""Image-to-image unlearning: the encoder of a model that is shown pictures reads those of a concept as noise."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.erasure.fine_tuning import FineTuningEraser, StudentObjective
from sublimate.erasure.latent_bank import LatentBank
from sublimate.erasure.picture_noise import PictureNoise
from sublimate.erasure.pictured import DrawingConfig
from sublimate.erasure.prompt_bank import PromptBank
from sublimate.erasure.request import Request
from sublimate.erasure.trajectories import noised
from sublimate.pipelines.features import unet_code
from sublimate.pipelines.generate import generate_latents
from sublimate.pipelines.model import Model
from sublimate.training.losses import squared_loss
from sublimate.training.objective import Batch, Loss, Turn
from sublimate.training.randomness import SampleRandom


class ImageToImageConfig(DrawingConfig):
    """Options of image-to-image unlearning.

    Attributes:
        weights: the encoder's alone, the UNet's way down and its middle.
        alpha: weight of the forgetting term; the paper's 0.25 is recalled (not verified).
        code: what of the encoder is compared: "all" that the way up is given, or the "middle" alone. A picture that is
            gone from the middle still passes through the skip connections.
        text_dropout: share of samples that are told no text, as when a picture is only to be completed.
        retain: weight of the first term; 0 leaves it out.

    The others are `DrawingConfig`'s and `FineTuningConfig`'s. Pictures of concepts are drawn by the model, or
    `Concept.images`.
    """

    weights: Literal["encoder"] = "encoder"
    alpha: float = Field(default=0.25, gt=0)
    code: Literal["all", "middle"] = "all"
    text_dropout: float = Field(default=0.5, ge=0, le=1)

    def passes(self, step: int = 0) -> float:
        """A pass that ends with the encoder counts as a whole one."""
        return 4 + 4 * (self.retain > 0)


class ImageToImageObjective(StudentObjective):
    """retain E |E_theta(T(x_r)) - E_theta0(T(x_r))|^2 + alpha E |E_theta(T(x_f)) - E_theta0(T(n))|^2 on encoders E.

    x_f are pictures of the concepts, x_r of preserved ones; without any, what the model draws unasked stands in for
    them, as the paper's proxy set does. T shows a picture as the family's training does (a hole to paint, a small
    copy) and treats n ~ N(mu, Sigma) as it treated x_f. mu and Sigma are those of the colours of all x_r: n has no
    pattern in space, which a covariance of whole pictures, from fewer of them than they have pixels, would give it.

    The UNet also reads x_t, here the noised x_f or x_r: it is what is being drawn, and the same for both encoders.
    """

    Config = ImageToImageConfig
    paper: ClassVar[str] = "2402.00351"
    config: ImageToImageConfig
    reads_pictures = True
    always_retains = True

    def __init__(self, model: Model, config: ImageToImageConfig, request: Request, *, seed: int = 0) -> None:
        if not model.backbone.shown:
            raise ValueError(
                f"{model.source} is shown no pictures: use image_to_image on inpainting or upscaling models."
            )
        _check_pictures(model, request)
        super().__init__(model, config, request, seed=seed)
        network = model.denoiser.network
        self.model, self.taps = model, unet_code(network) if config.code == "all" else ("mid_block",)
        self.pictures = config.drawn(model, request.erase, seed=seed)
        self.others, self.other_pictures = self._retained(model, request)
        self.kept = self.others if config.retain > 0 else None
        self.noise = PictureNoise(model, self.other_pictures, config.train_batch_size)

    @property
    def shardable(self) -> bool:
        return False  # the student's pass ends with its code

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        random = batch.random
        found = self._drawn(random, self.erased, self.pictures)
        replay = random.twin()
        pictures = self.model.render(found.pop("x0"))
        shown = self._shown(pictures, random)
        noise = self._shown(self.noise.draw(random, pictures.shape[2:]), replay)
        batch = batch.adding(**found, **_named("shown", shown), **_named("noise", noise))
        if self.kept is not None:
            kept = self._drawn(random, self.kept, self.other_pictures)
            seen = self._shown(self.model.render(kept.pop("x0")), random)
            batch = batch.adding(**{f"kept_{name}": value for name, value in kept.items()}, **_named("kept", seen))
        return batch

    def unread(self, model: Model) -> list[str]:
        return [name for name in super().unread(model) if name != "vae"]

    def _drawn(self, random: SampleRandom, bank: PromptBank, pictures: LatentBank) -> dict[str, Tensor]:
        """Pictures with noise, rows of their prompts, and which of these are not told."""
        rows, dropped = bank.draw(random), random.uniform() < self.config.text_dropout
        x0 = pictures.draw(rows, random, self.device)
        x_t, t = noised(self.frozen.schedule, x0, random.normal(self.shape, self.device), random.uniform(self.device))
        return {"rows": rows, "dropped": dropped.to(self.device), "x0": x0, "x_t": x_t, "t": t}

    def _retained(self, model: Model, request: Request) -> tuple[PromptBank, LatentBank]:
        """Prompts and pictures of what is preserved; without any, what the model draws when asked for nothing."""
        config = self.config
        if request.preserve:
            prompts = self.bank(model, request.preserve, config.templates)
            return prompts, config.drawn(model, request.preserve, seed=self.seed)
        drawn = generate_latents(
            model,
            [""] * config.images,
            steps=config.sampling_steps,
            guidance_scale=1.0,
            seed=self.seed,
            batch_size=config.train_batch_size,
        )
        return PromptBank(model, [[""]], self.guidance), LatentBank([drawn.float().cpu()])

    def _shown(self, images: Tensor, random: SampleRandom) -> Condition:
        return self.model.backbone.show_examples(self.model.pipeline, images, random)

    def told(self, batch: Batch, bank: PromptBank, shown: str, prefix: str = "") -> Condition:
        """Prompts and pictures of the batch: of the tensors named `shown/...`."""
        told = bank.condition(batch[f"{prefix}rows"], self.device)
        told = told.dropping(batch[f"{prefix}dropped"], self.null.to(self.device))
        start = f"{shown}/"
        return told.replace(**{n.removeprefix(start): v for n, v in batch.tensors.items() if n.startswith(start)})

    def code_error(self, x_t: Tensor, t: Tensor, told: Condition, aimed: Condition) -> Tensor:
        """|E_theta(told) - E_theta0(aimed)|^2, a mean over elements, codes and samples."""
        with torch.no_grad():
            aims = self.frozen.activations(x_t, t, aimed, features=self.taps).features
        codes = self.student.activations(x_t, t, told, features=self.taps).features
        return torch.stack([squared_loss(codes[name], aims[name]).mean() for name in self.taps]).mean()

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        told, aimed = (self.told(batch, self.erased, shown) for shown in ("shown", "noise"))
        error = self.code_error(batch["x_t"], batch["t"], told, aimed)
        return self.weighed(batch, {"forget": (self.config.alpha, error)})

    def retain_error(self, batch: Batch, kept: PromptBank) -> Tensor:
        told = self.told(batch, kept, "kept", "kept_")
        return self.code_error(batch["kept_x_t"], batch["kept_t"], told, told)


class ImageToImage(FineTuningEraser):
    """Machine unlearning for image-to-image generative models (Li et al. 2024)."""

    Config = ImageToImageConfig
    paper: ClassVar[str] = ImageToImageObjective.paper
    objective = ImageToImageObjective
    uses_anchor = False
    uses_images = True
    uses_kept_images = True


def _check_pictures(model: Model, request: Request) -> None:
    if model.backbone.draws_from_text:
        return
    if missing := [concept.name for concept in (*request.erase, *request.preserve) if not concept.images]:
        raise ValueError(f"{model.source} draws nothing from text alone: give pictures (images) of {missing[0]!r}.")
    if not request.preserve:
        raise ValueError(f"{model.source} draws nothing from text alone: preserve a concept with pictures (images).")


def _named(name: str, condition: Condition) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for key, value in condition.items()}
