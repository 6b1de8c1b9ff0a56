"""Where batches come from: prompts, and images with their captions, drawn by sample-keyed random numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.model import Model
from sublimate.pipelines.negative_attention import as_negative
from sublimate.training.objective import Batch
from sublimate.training.randomness import SampleRandom


class Source(Protocol):
    """Draws a batch; `provides` says which of an objective's needs it meets."""

    @property
    def provides(self) -> frozenset[str]: ...

    def batch(self, random: SampleRandom) -> Batch:
        """A batch of len(random) samples that depends on `random` alone."""
        ...


class ModelSource:
    """Prompts, and latents that belong to them, for training on a model; samples are drawn with replacement.

    A model that is shown pictures gets them too, made from the samples' own by its backbone's `show_examples`.

    Args:
        model: encodes the prompts (its text encoder stays frozen).
        prompts: one per sample; empty for an unconditional model.
        latents: (samples, *latent_shape), `latents[i]` shows `prompts[i]`; None when the objective is data-free.
        negatives: negative prompts, paired with prompts at random; the condition then has them as "negative".
        samples: (samples, *latent_shape), the model's own, `samples[i]` for `prompts[i]`.
        pictures: (samples, 3, height, width) in [0, 1], what `latents` were made from; decoded latents unless given.
            Only models that are shown pictures have a use for them.

    Raises:
        ValueError: when the numbers differ, or a model that is shown pictures gets none.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str] = (),
        latents: Tensor | None = None,
        negatives: Sequence[str] = (),
        samples: Tensor | None = None,
        pictures: Tensor | None = None,
    ) -> None:
        self.tensors = {name: x for name, x in (("images", latents), ("samples", samples)) if x is not None}
        for name, x in self.tensors.items():
            if prompts and len(x) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts do not match {len(x)} {name}: give one prompt for each.")
        self.model, self.prompts, self.negatives = model, list(prompts), list(negatives)
        self.shown, self.pictures = model.backbone.shown, pictures
        if self.shown and latents is None:
            raise ValueError(f"{model.source} is shown {self.shown}, which are made from images: give images.")
        if pictures is not None and (not self.shown or len(pictures) != len(self.tensors["images"])):
            raise ValueError("Pictures are for models that are shown some, one for each of the latents.")

    @property
    def provides(self) -> frozenset[str]:
        given = {"prompts": bool(self.prompts), "negatives": bool(self.negatives), self.shown: bool(self.shown)}
        return frozenset(self.tensors) | {name for name, present in given.items() if present}

    def batch(self, random: SampleRandom) -> Batch:
        count = len(self.prompts) or min((len(x) for x in self.tensors.values()), default=1)
        indices = random.integers(count)
        with torch.no_grad():
            prompts = [self.prompts[i] for i in indices.tolist()] if self.prompts else []
            condition = self.model.encode_prompts(prompts) if prompts else Condition()
            if self.negatives:
                chosen = [self.negatives[i] for i in random.integers(len(self.negatives)).tolist()]
                condition = condition.replace(**as_negative(self.model.encode_prompts(chosen)))
            if self.shown:
                condition = condition.replace(**self._show(indices, random))
        return Batch(condition, random, {name: x[indices] for name, x in self.tensors.items()})

    def _show(self, indices: Tensor, random: SampleRandom) -> Condition:
        """What the model is shown of some samples."""
        if self.pictures is not None:
            images = self.pictures[indices]
        else:
            images = self.model.render(self.tensors["images"][indices].to(self.model.device))
        return self.model.backbone.show_examples(self.model.pipeline, images, random)


def read_prompts(path: Path) -> list[str]:
    """Prompts from a text file, one per line, or from JSON lines with a `text` field.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds no prompt or a line is not as expected.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no prompt file {path}: give a text file with one prompt per line.")
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        try:
            lines = [str(json.loads(line)["text"]) for line in lines]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'Every line of {path} must be JSON with a "text" field ({error!r}).') from error
    if not lines:
        raise ValueError(f"The prompt file {path} is empty: give one prompt per line.")
    return lines


def image_files(folder: Path) -> tuple[Path, ...]:
    """The picture files of a folder, by name.

    Raises:
        FileNotFoundError: when there are none.
    """
    kinds = Image.registered_extensions()
    found = tuple(sorted(path for path in folder.glob("*") if path.suffix.lower() in kinds))
    if not found:
        raise FileNotFoundError(f"{folder} holds no pictures: name a folder of image files.")
    return found


def read_image(path: Path) -> Tensor:
    """A picture file as (3, H, W) in [0, 1].

    Raises:
        FileNotFoundError: when there is no such file.
        PIL.UnidentifiedImageError: when it is no picture.
    """
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_image_folder(folder: Path) -> tuple[list[str], Tensor]:
    """Captions and images of a folder laid out like Hugging Face's `imagefolder`.

    `metadata.jsonl` names each picture (`file_name`) and its caption (`text`).

    Returns:
        Captions, and images (N, 3, H, W) in [0, 1].

    Raises:
        FileNotFoundError: when the folder, its metadata or a picture is missing.
        ValueError: when a line or a picture is damaged, or the pictures differ in size.
    """
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise FileNotFoundError(f"{folder} has no metadata.jsonl: one JSON line with file_name and text per picture.")
    captions, images = [], []
    for line in filter(str.strip, metadata.read_text().splitlines()):
        try:
            row = json.loads(line)
            captions.append(str(row["text"]))
            images.append(read_image(folder / row["file_name"]))
        except (json.JSONDecodeError, KeyError, TypeError, UnidentifiedImageError) as error:
            raise ValueError(f"A line of {metadata} cannot be used ({error!r}): {line[:80]}") from error
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) != 1:
        raise ValueError(
            f"The pictures of {folder} must exist and have one size, but have {sorted(sizes)}: resize them."
        )
    return captions, torch.stack(images)
