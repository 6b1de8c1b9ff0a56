"""Where batches come from: prompts, and images with their captions, drawn by sample-keyed random numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
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


class Named(Source, Protocol):
    """A source that a configuration describes: a resumed run must have the same texts."""

    def identity(self) -> list[Any]:
        """The texts that it asks for, as JSON."""
        ...


@runtime_checkable
class Placed(Source, Protocol):
    """A source whose batches depend on how much was read before: its place belongs to a checkpoint."""

    def place(self) -> dict[str, Any]:
        """Where this process is, as JSON; the places of all processes make one mapping."""
        ...

    def seek(self, place: Mapping[str, Any]) -> None:
        """Goes on where a mapping of all processes' places says."""
        ...


class Table(Protocol):
    """Rows of tensors: a tensor, or what reads or makes the rows that are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """Rows (len(indices), ...)."""
        ...


Encode = Callable[[Sequence[str]], Condition]


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
        encode: encodes the prompts instead of the model.

    Raises:
        ValueError: when the numbers differ, or a model that is shown pictures gets none.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str] = (),
        latents: Table | None = None,
        negatives: Sequence[str] = (),
        samples: Table | None = None,
        pictures: Table | None = None,
        encode: Encode | None = None,
    ) -> None:
        self.tensors = {name: x for name, x in (("images", latents), ("samples", samples)) if x is not None}
        for name, x in self.tensors.items():
            if prompts and len(x) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts do not match {len(x)} {name}: give one prompt for each.")
        self.model, self.prompts, self.negatives = model, list(prompts), list(negatives)
        self.encode: Encode = encode or model.encode_prompts
        self.shown, self.pictures = model.backbone.shown, pictures
        if self.shown and latents is None:
            raise ValueError(f"{model.source} is shown {self.shown}, which are made from images: give images.")
        if pictures is not None and (not self.shown or len(pictures) != len(self.tensors["images"])):
            raise ValueError("Pictures are for models that are shown some, one for each of the latents.")

    @property
    def provides(self) -> frozenset[str]:
        given = {"prompts": bool(self.prompts), "negatives": bool(self.negatives), self.shown: bool(self.shown)}
        return frozenset(self.tensors) | {name for name, present in given.items() if present}

    def identity(self) -> list[Any]:
        """Prompts and negative prompts."""
        return [self.prompts, self.negatives]

    def batch(self, random: SampleRandom) -> Batch:
        count = len(self.prompts) or min((len(x) for x in self.tensors.values()), default=1)
        indices = random.integers(count)
        prompts = [self.prompts[i] for i in indices.tolist()] if self.prompts else []
        condition = condition_of(self.encode, prompts, self.negatives, random)
        tensors = {name: x[indices] for name, x in self.tensors.items()}
        if self.shown:
            images = self._rendered(tensors["images"]) if self.pictures is None else self.pictures[indices]
            condition = shown_of(self.model, condition, images, random)
        return Batch(condition, random, tensors)

    @torch.no_grad()
    def _rendered(self, latents: Tensor) -> Tensor:
        return self.model.render(latents.to(self.model.device))


@torch.no_grad()
def condition_of(encode: Encode, prompts: Sequence[str], negatives: Sequence[str], random: SampleRandom) -> Condition:
    """What the network is told of prompts, one per sample or none, and of negative prompts that are drawn for them."""
    condition = encode(prompts) if prompts else Condition()
    if negatives:
        chosen = [negatives[i] for i in random.integers(len(negatives)).tolist()]
        condition = condition.replace(**as_negative(encode(chosen)))
    return condition


@torch.no_grad()
def shown_of(model: Model, condition: Condition, images: Tensor, random: SampleRandom) -> Condition:
    """A condition with what the network is shown of images (batch, 3, height, width), one per sample."""
    return condition.replace(**model.backbone.show_examples(model.pipeline, images, random))


def read_prompts(path: Path) -> list[str]:
    """Prompts from a text file, one per line, or from JSON lines with a `text` field.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds no prompt or a line is not as expected.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no prompt file {path}: give a text file with one prompt per line.")
    # Lines end as files have them: what else Unicode takes for an end may stand in a prompt.
    lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if path.suffix == ".jsonl":
        try:
            lines = [json.loads(line)["text"] for line in lines]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'Every line of {path} must be JSON with a "text" field ({error!r}).') from error
        if wrong := [line for line in lines if not isinstance(line, str)]:
            raise ValueError(f'Every "text" of {path} must be a text, and {wrong[0]!r} is none.')
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
