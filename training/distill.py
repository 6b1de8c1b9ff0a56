"""Distillation from a configuration to an exported student: the Python path behind `sublimate distill`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self, cast

import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.pipelines.attachments import export_attachment
from sublimate.pipelines.attention import Kernel, attention_chosen
from sublimate.pipelines.edit import Edit
from sublimate.pipelines.export import export_lora, export_student, stock_sampling
from sublimate.pipelines.few_steps import sample_few_steps
from sublimate.pipelines.generate import generate_latents, telling
from sublimate.pipelines.model import Model, open_model
from sublimate.pipelines.pictures import image_grid, pictures_of, to_png
from sublimate.training import registry
from sublimate.training.checkpoints import fingerprint, lasting
from sublimate.training.config import Config, dump_config, validate_section
from sublimate.training.data import ModelSource, Source, read_image_folder, read_prompts
from sublimate.training.ink.sources import captioned
from sublimate.training.ink.vocabulary import SYNONYMS
from sublimate.training.objective import Artefact, Objective, ObjectiveConfig
from sublimate.training.randomness import SampleRandom
from sublimate.training.trainer import Trainer, TrainerConfig

OBJECTIVES = "sublimate.training.objectives"


class DataConfig(Config):
    """Where prompts and images come from.

    Attributes:
        prompts: "ink" for captions of Ink's grammar, or a text or JSON-lines file (of names or numbers of classes, for
            a model of those); None for an unconditional model, and for a folder of images, which has captions.
        images: the real class and the data of objectives that read images: "teacher" for the (edited) teacher's own
            guided samples, "ink" for renderings, a folder of images with `metadata.jsonl`; None for none.
        negatives: negative prompts for objectives that need them: "ink" for Ink's own concepts, or a text file.
        count: captions and images to draw when they come from "ink" or "teacher".
        teacher_steps: sampling steps of the teacher's own samples.
        seed: seed of those draws.
    """

    prompts: str | None = "ink"
    images: str | None = "teacher"
    negatives: str | None = None
    count: int = Field(default=4096, ge=1)
    teacher_steps: int = Field(default=25, ge=1)
    seed: int = Field(default=0, ge=0)


class DistillConfig(Config):
    """One distillation run; a YAML file in `configs/distill/` holds exactly these fields.

    Attributes:
        model: the teacher: a packaged name, a diffusers folder, a `.safetensors` file or a hub id.
        edits: edit files applied to the teacher first, in order.
        attention: the attention kernel of the teacher and its players (`sublimate.pipelines.attention`); None leaves
            the model's own.
        method: name of a file in `training/objectives/`.
        objective: that method's options.
        data: prompts and images.
        trainer: the training run; the student is written to `<output_dir>/student`.
        save_dtype: precision of the exported student; training is not touched by it.
        validation_prompts: prompts of the sample pictures.
    """

    model: str = "ink"
    edits: tuple[Path, ...] = ()
    attention: Kernel | None = None
    method: str = "f_distill"
    objective: dict[str, object] = Field(default_factory=dict)
    data: DataConfig = DataConfig()
    trainer: TrainerConfig = TrainerConfig()
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    validation_prompts: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _validates(self) -> Self:
        if bool(self.validation_prompts) != (self.trainer.validation_steps is not None):
            raise ValueError("validation_prompts and trainer.validation_steps go together: set both or neither.")
        return self

    def passes(self) -> float:
        """Counted network passes of the training, per process; without the teacher's own samples."""
        method = registry.load(OBJECTIVES, self.method, Objective)
        options = validate_section(method.Config, self.objective)
        batch = self.trainer.train_batch_size * self.trainer.gradient_accumulation_steps
        return batch * sum(options.passes(step) for step in range(self.trainer.max_train_steps))


def distill(
    config: DistillConfig, model: Model | None = None, *, progress: bool | Callable[[str], None] = True
) -> Path:
    """Trains a student and exports it as a folder that stock diffusers opens.

    Args:
        config: the run.
        model: an open teacher to use instead of opening `config.model`; `config.edits` are applied to it.
        progress: show progress bars.

    Returns:
        The student's folder, `<output_dir>/student`.

    Raises:
        ValueError: when the method, its options or the data do not fit the model.
        Interrupted: when stopped by a signal, after saving.
    """
    method = registry.load(OBJECTIVES, config.method, Objective)
    options = validate_section(method.Config, config.objective)
    model = open_model(config.model) if model is None else model
    for path in config.edits:
        Edit.load(path).apply(model)
    home = model.device
    model.to(Accelerator().device)
    try:
        with attention_chosen(model, config.attention, autocast=config.trainer.mixed_precision == "bf16"):
            return _run(config, model, method, options, progress=bool(progress))
    finally:
        model.to(home)


def _run(
    config: DistillConfig, model: Model, method: type[Objective], options: ObjectiveConfig, *, progress: bool
) -> Path:
    torch.manual_seed(config.trainer.seed)
    objective = method(model, options)
    if config.data.negatives is not None and "negatives" not in objective.needs:
        raise ValueError(f"{config.method} reads no negative prompts with these options: set data.negatives to null.")
    artefact = objective.exports()
    if artefact.kind == "attachment" and config.save_dtype != "float32":
        raise ValueError(f"{config.method} exports an attachment, which is float32: leave out save_dtype.")
    if artefact.kind != "attachment":  # refused now rather than after training
        stock_sampling(model, artefact.kind, artefact.start_time, artefact.few_steps, as_base=artefact.as_base)
    source = make_source(model, config.data, options.sample_guidance, needs=objective.needs, progress=progress)
    validate = _validator(model, objective, config, source)
    identity = fingerprint(model.content_hash(), lasting(options.model_dump(mode="json")), config.data.model_dump())
    trainer = Trainer(objective, source, config.trainer, validate=validate, fingerprint=identity, progress=progress)
    trainer.run()
    folder = config.trainer.output_dir / "student"
    if trainer.accelerator.is_main_process:
        with trainer.averaged():
            _export(model, objective, config, folder)
    trainer.accelerator.wait_for_everyone()
    return folder


def make_source(
    model: Model,
    data: DataConfig,
    guidance_scale: float,
    *,
    needs: frozenset[str] = frozenset({"images"}),
    progress: bool = True,
) -> Source:
    """The source that `data` describes; images become latents once, here.

    Args:
        model: the teacher, with its edits applied.
        data: prompts and images.
        guidance_scale: guidance of the teacher's own samples, so that they follow the score being distilled.
        needs: what the objective reads: without "images" the teacher draws none; with "samples" it draws one of every
            prompt, for objectives that compare it with the image.
        progress: show a bar while sampling.

    Raises:
        ValueError: when the data do not fit each other or the model.
    """
    if model.backbone.shown and "samples" in needs:
        raise ValueError(
            f"This objective compares images with the teacher's own samples, which {model.source} draws of pictures "
            "that it is shown: choose another method."
        )
    if not model.backbone.draws_from_text and data.images == "teacher":
        raise ValueError(f"{model.source} draws by pictures and has none of its own: set data.images to a folder.")
    prompts, images = _prompts_and_images(data)

    def drawn() -> Tensor:
        steps, seed = data.teacher_steps, data.seed
        texts = prompts or data.count
        x0 = generate_latents(model, texts, steps=steps, guidance_scale=guidance_scale, seed=seed, progress=progress)
        return x0.cpu()

    latents: Tensor | None = None
    if "images" in needs or model.backbone.shown:
        if data.images == "teacher":
            latents = drawn()
        elif images is not None:
            with torch.no_grad():
                latents = torch.cat([model.encode(part.to(model.device)).cpu() for part in images.split(64)])
    negatives = list(SYNONYMS) if data.negatives == "ink" else _prompts_of(data.negatives)
    pictures = images if model.backbone.shown else None
    return ModelSource(model, prompts, latents, negatives, drawn() if "samples" in needs else None, pictures)


def _prompts_of(file: str | None) -> list[str]:
    return [] if file is None else read_prompts(Path(file))


def _prompts_and_images(data: DataConfig) -> tuple[list[str], Tensor | None]:
    if data.images not in (None, "teacher", "ink"):
        if data.prompts is not None:
            raise ValueError("An image folder brings its own captions: set data.prompts to null.")
        return read_image_folder(Path(data.images))
    if data.images == "ink" and data.prompts not in ("ink", None):
        raise ValueError('Images from "ink" come with their own captions: set data.prompts to "ink" too.')
    if "ink" not in (data.prompts, data.images):
        return _prompts_of(data.prompts), None
    prompts, images = captioned(data.count, data.seed, render=data.images == "ink")
    return prompts if data.prompts == "ink" else [], images


def _validator(
    model: Model, objective: Objective, config: DistillConfig, source: Source
) -> Callable[[int], None] | None:
    """Draws `validation_prompts` with the student into `<output_dir>/samples/`, the same noise every time.

    A model that is shown pictures is shown some of the source's.
    """
    if not config.validation_prompts:
        return None
    artefact = objective.exports()
    if artefact.kind == "attachment" or artefact.as_base:
        raise ValueError(
            f"{config.method} trains no student that draws in few steps, as validation does: leave out "
            "validation_prompts."
        )
    generator = torch.Generator().manual_seed(config.trainer.seed)
    z = torch.randn((len(config.validation_prompts), *model.latent_shape), generator=generator)
    condition = model.encode_prompts(config.validation_prompts)
    if model.backbone.shown:
        random = SampleRandom(config.trainer.seed, 0, "validation", range(len(z)))
        condition = condition.replace(**source.batch(random).condition.extra)

    def validate(step: int) -> None:
        x0 = _drawn(model, objective.exports(), condition, z, config.trainer.seed)
        folder = config.trainer.output_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        picture = image_grid(pictures_of(model.render(x0), model.backbone.medium), columns=8)
        (folder / f"{step:07d}.png").write_bytes(to_png(picture))

    return validate


def _drawn(model: Model, artefact: Artefact, condition: Condition, z: Tensor, seed: int) -> Tensor:
    """The student's x0 from z ~ N(0, I), in one step or in as many as it is made for."""
    schedule, few = model.schedule, artefact.few_steps
    if few is None:
        t = schedule.t_max if artefact.start_time is None else artefact.start_time
        return artefact.module((schedule.start_scale(t) * z).to(model.device), t, condition).x0
    student = cast(Denoiser, artefact.module)
    told = telling(
        student,
        condition,
        model.null_condition(),
        few.guidance_scale,
        reads_target=few.sampler == "trajectory",
    )
    generator = torch.Generator().manual_seed(seed + 1)
    fresh = (torch.randn(z.shape, generator=generator) for _ in range(few.steps))
    return sample_few_steps(few, told, z.to(model.device), schedule, lambda x: next(fresh).to(x))


def _export(model: Model, objective: Objective, config: DistillConfig, folder: Path) -> None:
    artefact = objective.exports()
    provenance = {**objective.describe(), "config": dump_config(config), "base": model.source}
    if artefact.kind == "attachment":
        export_attachment(model, artefact.module, folder, provenance=provenance, **artefact.attachment)
        return
    write = export_lora if artefact.kind == "lora" else export_student
    write(
        model,
        artefact.module,
        folder,
        t=artefact.start_time,
        few_steps=artefact.few_steps,
        as_base=artefact.as_base,
        dtype=None if config.save_dtype == "float32" else getattr(torch, config.save_dtype),
        provenance=provenance,
    )
