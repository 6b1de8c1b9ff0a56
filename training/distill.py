"""Distillation from a configuration to an exported student: the Python path behind `sublimate distill`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.pipelines.attachments import export_attachment
from sublimate.pipelines.attention import Kernel, attention_chosen
from sublimate.pipelines.edit import Edit, open_edited
from sublimate.pipelines.edit_attachment import detached, strip
from sublimate.pipelines.edit_stack import differs_from_disk
from sublimate.pipelines.export import export_lora, export_student, stock_sampling
from sublimate.pipelines.few_steps import sample_few_steps
from sublimate.pipelines.gradient_checkpointing import checkpointed
from sublimate.pipelines.memory_format import channels_last
from sublimate.pipelines.model import Model
from sublimate.pipelines.pictures import image_grid, pictures_of, to_png
from sublimate.pipelines.sampling import at_once, telling
from sublimate.training import registry
from sublimate.training.checkpoints import fingerprint, lasting
from sublimate.training.config import Config, dump_config, validate_section
from sublimate.training.data import Placed, Source
from sublimate.training.data_config import DataConfig
from sublimate.training.forgetting import Forget, anchored, forgetful
from sublimate.training.objective import Artefact, Objective, ObjectiveConfig
from sublimate.training.parking import at_hand, park
from sublimate.training.precision import autocast, check_precision, tf32
from sublimate.training.randomness import SampleRandom
from sublimate.training.sources import make_source, unread_networks
from sublimate.training.start import start_from
from sublimate.training.together import accelerator
from sublimate.training.trainer import Trainer, TrainerConfig

OBJECTIVES = "sublimate.training.objectives"


class DistillConfig(Config):
    """One distillation run; a YAML file in `configs/distill/` holds exactly these fields.

    Attributes:
        model: the teacher: a packaged name, a diffusers folder, a `.safetensors` file or a hub id.
        revision: branch, tag or commit of a hub id.
        variant: of the weights' files, such as "fp16".
        file_config: of a single file: a diffusers folder or hub id with its configuration, and with what it lacks.
        loras: LoRAs added to the teacher's weights when it is opened: files, folders or hub ids,
            as `open_model` takes them.
        edits: edit files applied to the teacher then, in order.
        dtype: precision that the teacher is opened in, and with it all that players share. "bfloat16" takes half the
            memory and needs `trainer.mixed_precision=bf16`; what trains is float32 either way.
        attention: the attention kernel of the teacher and its players (`sublimate.pipelines.attention`); None leaves
            the model's own.
        allow_tf32: multiply float32 matrices, an encoder's say, in TF32 on GPUs that have it.
        channels_last: store convolutions with channels last: faster for UNets in half precision on a GPU.
        method: name of a file in `training/objectives/`.
        objective: that method's options.
        student_from: what the student starts as, where that is not its teacher: a student of an earlier stage, as the
            folder of its pipeline, or of its LoRA where it trains one.
        forget: concepts that the student shall not learn: for prompts that name one, the teacher is asked for its
            anchor. A discriminator's features then take a pass of their own, which is not counted.
        data: prompts and images.
        trainer: the training run; the student is written to `<output_dir>/student`.
        save_dtype: precision of the exported student; training is not touched by it.
        validation_prompts: prompts of the sample pictures.
    """

    model: str = "ink"
    revision: str | None = None
    variant: str | None = None
    file_config: str | None = None
    loras: tuple[str, ...] = ()
    edits: tuple[Path, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Kernel | None = None
    allow_tf32: bool = False
    channels_last: bool = False
    method: str = "f_distill"
    objective: dict[str, object] = Field(default_factory=dict)
    student_from: str | None = None
    forget: tuple[Forget, ...] = ()
    data: DataConfig = DataConfig()
    trainer: TrainerConfig = TrainerConfig()
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    validation_prompts: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _validates(self) -> Self:
        for one in self.forget:
            if one.anchor and anchored(one.anchor, self.forget) != one.anchor:
                raise ValueError(f"The anchor {one.anchor!r} of {one.concept!r} is to be forgotten itself.")
        if bool(self.validation_prompts) != (self.trainer.validation_steps is not None):
            raise ValueError("validation_prompts and trainer.validation_steps go together: set both or neither.")
        return self

    def resolved(self) -> Self:
        """The same run, with the defaults of its method's options written out."""
        method = registry.load(OBJECTIVES, self.method, Objective)
        options = validate_section(method.Config, self.objective)
        return self.model_copy(update={"objective": options.model_dump(mode="json")})

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

    Of an edited teacher the student starts with the edited weights and reads the edited text encoders. What an edit
    attaches stays with the teacher: the student starts, and reads, without it, and learns what it does. A LoRA student
    of a teacher that differs from its checkpoint, by edits or by LoRAs, is exported whole: on that checkpoint it would
    be another.

    Args:
        config: the run.
        model: an open teacher to use instead of opening `config.model`, without `config.loras`; `config.edits` are
            applied to it.
        progress: show progress bars.

    Returns:
        The student's folder, `<output_dir>/student`.

    Raises:
        ValueError: when the method, its options or the data do not fit the model.
        Interrupted: when stopped by a signal, after saving.
    """
    method = registry.load(OBJECTIVES, config.method, Objective)
    options = validate_section(method.Config, config.objective)
    last, steps = options.phases()[-1], config.trainer.max_train_steps
    if last >= steps:
        warnings.warn(
            f"{config.method} enters its last phase at step {last:,}, and trainer.max_train_steps is {steps:,}: the "
            "run ends before the method does. Train longer, or make its phases shorter.",
            stacklevel=2,
        )
    if model is not None and config.loras:
        raise ValueError("The teacher is open already: open it with these loras, and leave them out of the run.")
    if model is not None and config.dtype != "float32":
        raise ValueError("The teacher is open already, in its precision: leave dtype out of the run.")
    if model is None:
        model = open_edited(
            config.model,
            config.edits,
            dtype=getattr(torch, config.dtype),
            loras=config.loras,
            revision=config.revision,
            variant=config.variant,
            config=config.file_config,
        )
    else:
        for path in config.edits:
            Edit.load(path).apply(model)
    home = model.device
    model.to(accelerator().device)
    try:
        with (
            attention_chosen(model, config.attention, autocast=config.trainer.mixed_precision == "bf16"),
            tf32(config.allow_tf32),
            channels_last(model) if config.channels_last else nullcontext(),
            # Gradients pass through the frozen teacher, too.
            checkpointed(model) if config.trainer.gradient_checkpointing else nullcontext(),
        ):
            return _run(config, model, method, options, progress=bool(progress))
    finally:
        model.to(home)


def _run(
    config: DistillConfig, model: Model, method: type[Objective], options: ObjectiveConfig, *, progress: bool
) -> Path:
    check_precision(model, config.trainer.mixed_precision)
    torch.manual_seed(config.trainer.seed)
    objective = method(forgetful(model) if config.forget or model.attached else model, options)
    if config.data.negatives is not None and "negatives" not in objective.needs:
        raise ValueError(f"{config.method} reads no negative prompts with these options: set data.negatives to null.")
    artefact = objective.exports()
    if artefact.kind == "attachment" and config.forget:
        raise ValueError(f"{config.method} trains no student but adds to the model, which forgets nothing: edit it.")
    if artefact.kind == "attachment" and config.save_dtype != "float32":
        raise ValueError(f"{config.method} exports an attachment, which is float32: leave out save_dtype.")
    unattached = bool(model.attached) and artefact.kind != "attachment"
    if artefact.kind != "attachment":
        # A stock student cannot carry what edits attached to its teacher: it learns what that does.
        for player in objective.players().values():
            strip(player.module)
        with detached(model):  # refused now rather than after training
            check_export(model, artefact)
    began = []
    if config.student_from is not None:
        if (student := objective.players().get("student")) is None:
            raise ValueError(f"{config.method} trains no student of its own: leave out student_from.")
        began = [start_from(student, config.student_from, model.backbone.network_attribute)]
    launched = accelerator()
    config.trainer.output_dir.mkdir(parents=True, exist_ok=True)  # refused now rather than after the samples
    source = make_source(
        model,
        config.data,
        options.sample_guidance,
        needs=objective.needs,
        forget=config.forget,
        unattached=unattached,
        global_batch=config.trainer.local_batch * launched.num_processes,
        mixed_precision=config.trainer.mixed_precision,
        progress=progress and launched.is_main_process,
    )
    with detached(model) if unattached else nullcontext():
        validate = _validator(model, objective, config, source)
    concepts = [one.model_dump(mode="json") for one in config.forget]
    identity = fingerprint(
        model.content_hash(),
        lasting(options.model_dump(mode="json")),
        config.data.lasting(),
        source.identity(),
        *concepts,
        *began,
    )
    if config.data.cache_dir is not None:
        unread = unread_networks(model, config.data)
        park(model, unread, config.data.cache_dir, file_bytes=config.data.cache_shard_bytes)
    about = config.resolved().model_dump(mode="json")
    trainer = Trainer(
        objective, source, config.trainer, validate=validate, fingerprint=identity, about=about, progress=progress
    )
    trainer.run()
    folder = config.trainer.output_dir / "student"
    if trainer.accelerator.is_main_process:
        with trainer.averaged(), detached(model) if unattached else nullcontext():
            _export(model, objective, config, folder)
    trainer.accelerator.wait_for_everyone()
    return folder


def _validator(
    model: Model, objective: Objective, config: DistillConfig, source: Source
) -> Callable[[int], Tensor | None] | None:
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
    # Text is encoded now: its encoders may leave the memory before training starts.
    condition, null = model.encode_prompts(config.validation_prompts), model.null_condition()
    if model.backbone.shown:
        random = SampleRandom(config.trainer.seed, 0, "validation", range(len(z)))
        place = source.place() if isinstance(source, Placed) else None
        shown = source.batch(random).condition.extra
        condition = condition.replace(**shown.to(model.device))
        if isinstance(source, Placed) and place is not None:
            source.seek(place)

    def validate(step: int) -> Tensor | None:
        artefact, seed, size = objective.exports(), config.trainer.seed, at_once(model.latent_shape)
        parts = [slice(first, first + size) for first in range(0, len(z), size)]
        with autocast(model.device, config.trainer.mixed_precision):
            drawn = [
                _drawn(model, artefact, condition.index(part), null, z[part], seed + part.start) for part in parts
            ]
        # Sharded players draw in all processes together.
        if not accelerator().is_main_process:
            return None
        folder = config.trainer.output_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        with at_hand(model, "vae"):
            latents = torch.cat(drawn).split(at_once(model.latent_shape, cost=4))
            media = torch.cat([model.render(part) for part in latents])
        picture = image_grid(pictures_of(media, model.backbone.medium), columns=8)
        (folder / f"{step:07d}.png").write_bytes(to_png(picture))
        return picture

    return validate


def _drawn(model: Model, artefact: Artefact, condition: Condition, null: Condition, z: Tensor, seed: int) -> Tensor:
    """The student's x0 from z ~ N(0, I), in one step or in as many as it is made for."""
    schedule, few = model.schedule, artefact.few_steps
    if few is None:
        t = schedule.t_max if artefact.start_time is None else artefact.start_time
        return artefact.module((schedule.start_scale(t) * z).to(model.device), t, condition).x0
    student = cast(Denoiser, artefact.module)
    told = telling(
        student,
        condition,
        null,
        few.guidance_scale,
        reads_target=few.sampler == "trajectory",
    )
    generator = torch.Generator().manual_seed(seed + 1)
    fresh = (torch.randn(z.shape, generator=generator) for _ in range(few.steps))
    return sample_few_steps(few, told, z.to(model.device), schedule, lambda x: next(fresh).to(x))


def _format(model: Model, artefact: Artefact) -> Literal["weights", "lora"]:
    """What a student is exported as: a LoRA only where it fits the checkpoint that its teacher was opened from."""
    return "lora" if artefact.kind == "lora" and not differs_from_disk(model) else "weights"


def check_export(model: Model, artefact: Artefact) -> None:
    """Makes sure that stock diffusers runs what an objective trains.

    Raises:
        ValueError: when it does not, saying why.
    """
    if artefact.kind != "attachment":
        kind = _format(model, artefact)
        stock_sampling(model, kind, artefact.start_time, artefact.few_steps, as_base=artefact.as_base)


def _export(model: Model, objective: Objective, config: DistillConfig, folder: Path) -> None:
    artefact = objective.exports()
    provenance = {**objective.describe(), "config": dump_config(config.resolved(), public=True), "base": model.source}
    if artefact.kind == "attachment":
        export_attachment(model, artefact.module, folder, provenance=provenance, **artefact.attachment)
        return
    saved = getattr(torch, config.save_dtype)
    write = export_lora if _format(model, artefact) == "lora" else export_student
    write(
        model,
        artefact.module,
        folder,
        t=artefact.start_time,
        few_steps=artefact.few_steps,
        as_base=artefact.as_base,
        dtype=saved if saved != model.dtype else None,
        provenance=provenance,
    )
