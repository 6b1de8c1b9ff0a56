"""Trains Ink in three stages: autoencoder, detector, teacher; each stage resumes where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import torch
from diffusers import AutoencoderKL
from pydantic import Field, model_validator

from sublimate.pipelines.model import weights_hash
from sublimate.training.checkpoints import fingerprint, lasting
from sublimate.training.config import Config, dump_config
from sublimate.training.data import Source
from sublimate.training.ink.autoencoder import Autoencoding, AutoencodingConfig
from sublimate.training.ink.detecting import Detecting, DetectingConfig, DetectorPictures
from sublimate.training.ink.detector import InkDetector
from sublimate.training.ink.sources import CaptionedLatents, Pictures, encode_pictures
from sublimate.training.ink.teacher import Captioned, UntrainedTeacher, make_autoencoder, save_teacher
from sublimate.training.ink.tokenizer import build_tokenizer
from sublimate.training.objective import Objective
from sublimate.training.objectives.denoising import Denoising, DenoisingConfig
from sublimate.training.trainer import Trainer, TrainerConfig


class AutoencoderStage(Config):
    """The autoencoder's objective and training run."""

    objective: AutoencodingConfig = AutoencodingConfig()
    trainer: TrainerConfig = TrainerConfig()


class DetectorStage(Config):
    """The detector's objective and training run."""

    objective: DetectingConfig = DetectingConfig()
    trainer: TrainerConfig = TrainerConfig()


class TeacherStage(Config):
    """The teacher's objective, training run, and how many pictures it learns from."""

    pictures: int = Field(default=48000, ge=1)
    objective: DenoisingConfig = DenoisingConfig()
    trainer: TrainerConfig = TrainerConfig()


class InkConfig(Config):
    """All of Ink; `configs/teacher/ink.yaml` holds the settings of the shipped assets.

    Attributes:
        output_dir: receives `teacher/` (a diffusers folder), `detector.safetensors` and one folder per stage.
        seed: seed of every stage.
        stages: what to train after the autoencoder, which both need; two processes may share the work.
    """

    output_dir: Path = Path("runs/ink")
    seed: int = Field(default=0, ge=0)
    stages: tuple[Literal["detector", "teacher"], ...] = ("detector", "teacher")
    autoencoder: AutoencoderStage = AutoencoderStage()
    detector: DetectorStage = DetectorStage()
    teacher: TeacherStage = TeacherStage()

    @model_validator(mode="after")
    def _is_one_run(self) -> Self:
        unset = TrainerConfig()
        for name in ("autoencoder", "detector", "teacher"):
            trainer = getattr(self, name).trainer
            if (trainer.output_dir, trainer.seed) != (unset.output_dir, unset.seed):
                raise ValueError(
                    f"The stages share one folder and seed: set output_dir and seed, not {name}.trainer's."
                )
        return self


def train_ink(config: InkConfig, *, progress: bool = True) -> Path:
    """Trains every stage that is not finished and writes the assets.

    Returns:
        The output folder.

    Raises:
        Interrupted: when stopped by a signal, after saving.
    """
    autoencoder = _train_autoencoder(config, progress)
    if "detector" in config.stages:
        _train_detector(config, autoencoder, progress)
    if "teacher" in config.stages:
        _train_teacher(config, autoencoder, progress)
    return config.output_dir


def _train_autoencoder(config: InkConfig, progress: bool) -> AutoencoderKL:
    torch.manual_seed(config.seed)
    objective = Autoencoding(make_autoencoder(), config.autoencoder.objective)
    _run(objective, Pictures(), config, "autoencoder", progress)
    return objective.autoencoder.to("cpu").eval()  # where the pictures are made


def _train_detector(config: InkConfig, autoencoder: AutoencoderKL, progress: bool) -> None:
    torch.manual_seed(config.seed)
    objective = Detecting(InkDetector(), config.detector.objective)
    _run(
        objective,
        DetectorPictures(autoencoder),
        config,
        "detector",
        progress,
        weights_hash(autoencoder.state_dict().items()),
    )
    objective.detector.save(config.output_dir / "detector.safetensors")


def _train_teacher(config: InkConfig, autoencoder: AutoencoderKL, progress: bool) -> None:
    tokenizer = build_tokenizer()
    latents, glyphs = encode_pictures(autoencoder, config.teacher.pictures, progress=progress)
    # Diffusion assumes data of unit variance (Rombach et al. 2022, appendix G).
    factor = 1 / float(latents.std())
    autoencoder.register_to_config(scaling_factor=factor)
    torch.manual_seed(config.seed)
    untrained = UntrainedTeacher(tokenizer)
    objective = Denoising(untrained, config.teacher.objective)
    source = CaptionedLatents(factor * latents, glyphs, untrained.encode_prompts)
    identity = fingerprint(weights_hash(autoencoder.state_dict().items()), config.teacher.pictures)
    _run(objective, source, config, "teacher", progress, identity)
    provenance = {**objective.describe(), "config": dump_config(config, public=True)}
    save_teacher(_network(objective), autoencoder, tokenizer, config.output_dir / "teacher", provenance)


def _run(
    objective: Objective, source: Source, config: InkConfig, stage: str, progress: bool, identity: str = ""
) -> None:
    """Runs one stage in its own folder and leaves the averaged weights in place.

    It resumes from a checkpoint of the same options and `identity`, what else the stage was made from.
    """
    own = getattr(config, stage)
    options = own.trainer.model_copy(update={"output_dir": config.output_dir / "stages" / stage, "seed": config.seed})
    identity = fingerprint(lasting(own.objective.model_dump(mode="json")), identity)
    run = Trainer(objective, source, options, fingerprint=identity, progress=progress)
    run.run()
    for average in run.averages.values():
        average.store()


def _network(denoising: Denoising) -> Captioned:
    network = denoising.student.network
    if not isinstance(network, Captioned):
        raise TypeError(f"Ink's teacher trains UNet and text encoder together, not {type(network).__name__}.")
    return network
