"""The source of batches that a run's `data:` section describes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from sublimate.pipelines.generate import generate_latents
from sublimate.pipelines.model import Model
from sublimate.pipelines.tokens import cut_to_fit
from sublimate.training.captioned import Captioned, Framing, ImageFolder, Images
from sublimate.training.data import Encode, ModelSource, Named, Table, read_prompts
from sublimate.training.data_config import DataConfig
from sublimate.training.encoding import (
    Cache,
    Latents,
    Prompts,
    UnattachedPrompts,
    digest,
    encode_images,
    encoder_names,
)
from sublimate.training.forgetting import Forget, anchored, anchoring
from sublimate.training.hub_rows import DatasetRows, DatasetStream
from sublimate.training.ink.sources import captioned
from sublimate.training.ink.vocabulary import SYNONYMS
from sublimate.training.precision import autocast
from sublimate.training.streams import StreamSource
from sublimate.training.together import drawn_together

_IMAGES = frozenset({"images"})


def make_source(
    model: Model,
    data: DataConfig,
    guidance_scale: float,
    *,
    needs: frozenset[str] = _IMAGES,
    forget: Sequence[Forget] = (),
    unattached: bool = False,
    global_batch: int = 1,
    mixed_precision: str = "no",
    progress: bool = True,
) -> Named:
    """The source that `data` describes. With `data.cache_dir`, what the encoders make of it is stored first.

    Args:
        model: the teacher, with its edits applied.
        data: prompts and images.
        guidance_scale: guidance of the teacher's own samples, so that they follow the score being distilled; where
            `data.teacher_guidance_scale` is given, that.
        needs: what the objective reads: without "images" the teacher draws none; with "samples" it draws one of every
            prompt, for objectives that compare it with the image.
        forget: concepts in whose place a teacher is asked for anchors, and draws those.
        unattached: whether the student reads text encoders without what edits attached to them, as the teacher does.
        global_batch: samples that all processes draw together at a time; a stream is shared among them.
        mixed_precision: of the run, "no" or "bf16"; the teacher draws its samples in it.
        progress: show bars while sampling and storing.

    Raises:
        ValueError: when the data do not fit each other or the model.
    """
    _check(model, data, needs)
    scale = guidance_scale if data.teacher_guidance_scale is None else data.teacher_guidance_scale
    reads_images = "images" in needs or bool(model.backbone.shown)
    if forget and reads_images and data.images != "teacher":
        raise ValueError(
            "Images of prompts that name what is to be forgotten show it, and would teach it: set data.images to "
            "teacher, which draws the anchors."
        )
    negatives = list(SYNONYMS) if data.negatives == "ink" else _prompts_of(data.negatives)
    if data.streaming:
        return StreamSource(
            model,
            DatasetStream(data),
            framing_of(model, data),
            global_batch=global_batch,
            window=data.shuffle_buffer_size,
            mirrored=data.random_flip,
            negatives=negatives,
            captions=data.caption_column is not None,
            images=reads_images,
            seed=data.seed,
            encode=_encode(model, [], None, forget, unattached=unattached, truncate=data.truncate_prompts),
        )
    cache = None if data.cache_dir is None else Cache(data.cache_dir, data.cache_shard_bytes, progress)
    prompts, images = _prompts_and_images(model, data)
    if images is None and ("samples" in needs or (reads_images and data.images == "teacher")):
        prompts = _picked(prompts, data.count, data.seed)
    asked = [anchored(prompt, forget) for prompt in prompts] if forget else prompts
    if forget and asked == list(prompts):
        names = " or ".join(repr(one.concept) for one in forget)
        raise ValueError(f"No prompt names {names}: what is to be forgotten must be among the prompts.")
    encode: Encode | None = None
    if prompts or negatives:
        texts = [*prompts, *negatives, *asked]
        encode = _encode(model, texts, cache, forget, unattached=unattached, truncate=data.truncate_prompts)

    def draw(captions: Sequence[str]) -> Tensor:
        def share(places: slice) -> Tensor:
            return generate_latents(
                model,
                captions[places],
                steps=data.teacher_steps,
                guidance_scale=scale,
                seed=data.seed,
                first=places.start,
                progress=progress,
            )

        cutting = cut_to_fit() if data.truncate_prompts else nullcontext()
        with cutting, autocast(model.device, mixed_precision):
            return drawn_together(len(captions), share).cpu()

    def drawn() -> Tensor:
        captions = asked or [""] * data.count
        if cache is None:
            return draw(captions)
        return cache.drawn(
            "samples",
            len(captions),
            lambda: draw(captions),
            prompts=digest(captions),
            weights=model.content_hash(),
            precision=[str(model.dtype), mixed_precision],
            sampling=[dict(model.pipeline.scheduler.config), model.defaults, data.teacher_steps, scale],
            seed=data.seed,
            truncate=data.truncate_prompts,
        )

    latents: Table | None = None
    if reads_images and data.images == "teacher":
        latents = drawn()
    elif reads_images and images is not None:
        latents = Latents(model, images, cache) if isinstance(images, Images) else encode_images(model, images)
    pictures = images if model.backbone.shown else None
    samples = drawn() if "samples" in needs else None
    return ModelSource(model, prompts, latents, negatives, samples, pictures, encode)


def captioned_rows(data: DataConfig) -> Captioned:
    """The captioned pictures that `data` names, by row."""
    if _is_image_folder(data) and data.train_data_dir is not None:
        return ImageFolder(data.train_data_dir, data.caption_column)
    return DatasetRows(data)


def unread_networks(model: Model, data: DataConfig) -> list[str]:
    """The networks that no batch needs once the source is made: what they would say is stored."""
    if data.cache_dir is None:
        return []
    return [
        name for name in encoder_names(model) if name in model.backbone.text_components or not model.backbone.shown
    ]


def framing_of(model: Model, data: DataConfig) -> Framing:
    """How pictures become images of the model's own size.

    Raises:
        ValueError: when the model makes none, or `data.resolution` is another than its own.
    """
    if model.backbone.medium != "image":
        raise ValueError(f"{model.source} makes no images: captioned pictures are nothing to it.")
    own, pipe = model.latent_shape, model.pipeline
    # DiT's pipeline has an autoencoder and says nothing of its factor.
    factor = getattr(pipe, "vae_scale_factor", None)
    if factor is None:
        factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1) if "vae" in pipe.components else 1
    size = (own[1] * factor, own[2] * factor) if data.resolution is None else (data.resolution, data.resolution)
    if (shape := model.backbone.latent_shape(pipe, *size)) != own:
        raise ValueError(
            f"Images of {size[0]}x{size[1]} pixels are latents of {shape}, and {model.source} draws {own}: set "
            "data.resolution to the model's own."
        )
    return Framing(*size, center_crop=data.center_crop, seed=data.seed)


def _picked(prompts: Sequence[str], count: int, seed: int) -> Sequence[str]:
    """So many prompts at random, in their order; all of them where there are no more."""
    if len(prompts) <= count:
        return prompts
    places = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))[:count]
    return [prompts[place] for place in sorted(places.tolist())]


def _check(model: Model, data: DataConfig, needs: frozenset[str]) -> None:
    given = {
        "prompts": data.prompts is not None or (data.captioned and data.caption_column is not None),
        "images": data.images is not None or data.captioned,
        "negatives": data.negatives is not None,
    }
    if missing := [name for name, present in given.items() if name in needs and not present]:
        raise ValueError(f"The objective needs {missing[0]}, and the data have none: set data.{missing[0]}.")
    cropped = data.captioned and data.images != "teacher" and not data.center_crop
    if cropped and "images" in needs and model.backbone.told_crops:
        raise ValueError(
            f"{model.source} is told that its pictures are not cropped at the side: set data.center_crop to true."
        )
    draws = "samples" in needs or ("images" in needs and data.images == "teacher")
    if data.teacher_guidance_scale is not None and not draws:
        raise ValueError("teacher_guidance_scale is of the teacher's own samples, and it draws none: leave it out.")
    if model.backbone.shown and "samples" in needs:
        raise ValueError(
            f"This objective compares images with the teacher's own samples, which {model.source} draws of pictures "
            "that it is shown: choose another method."
        )
    if data.streaming and "samples" in needs:
        raise ValueError("This objective needs a sample of every prompt, and a stream has no end: set streaming off.")
    if data.streaming and _is_image_folder(data):
        raise ValueError(
            f"{data.train_data_dir} has a metadata.jsonl and is read by row as it is: set data.streaming to false."
        )
    if not model.backbone.draws_from_text and data.images == "teacher":
        raise ValueError(f"{model.source} draws by pictures and has none of its own: set data.train_data_dir.")


def _encode(
    model: Model,
    texts: Sequence[str],
    cache: Cache | None,
    forget: Sequence[Forget],
    *,
    unattached: bool,
    truncate: bool,
) -> Encode:
    """Encodes prompts, and beside them what the teacher alone is told, where that differs."""
    teachers = Prompts(model, texts, cache, truncate=truncate)
    if not forget and not unattached:
        return teachers
    own = UnattachedPrompts(model, texts, cache, truncate=truncate) if unattached else teachers
    return anchoring(own, teachers, forget)


def _is_image_folder(data: DataConfig) -> bool:
    return data.train_data_dir is not None and (data.train_data_dir / "metadata.jsonl").is_file()


def _prompts_of(file: str | None) -> list[str]:
    return [] if file is None else read_prompts(Path(file))


def _prompts_and_images(model: Model, data: DataConfig) -> tuple[Sequence[str], Images | Tensor | None]:
    if data.captioned:
        rows = captioned_rows(data)
        # Mirrored images are images of their own; the teacher's samples are not mirrored.
        if data.images == "teacher":
            return rows.captions, None
        images = Images(rows, framing_of(model, data), mirrored=data.random_flip)
        return images.captions, images
    if data.images == "ink" and data.prompts not in ("ink", None):
        raise ValueError('Images from "ink" come with their own captions: set data.prompts to "ink" too.')
    if "ink" not in (data.prompts, data.images):
        return _prompts_of(data.prompts), None
    prompts, pictures = captioned(data.count, data.seed, render=data.images == "ink")
    return prompts if data.prompts == "ink" else [], pictures
