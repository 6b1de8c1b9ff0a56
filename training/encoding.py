"""What the frozen encoders make of prompts and pictures: one sample at a time, remembered in memory or on disk.

A sample is encoded alone and in the model's own precision, so that what a network is told depends on the sample and
not on its batch, the number of processes, autocast or where the result was kept.

Layout of `cache_dir`; tables are as in `sublimate.training.shards`, and a name ends in the SHA-256 of what its rows
depend on:

    prompts-<hash>/    one row per different prompt, a column per entry of its condition
    latents-<hash>/    one row per image (a picture, or its mirror image), the column "latents"
    samples-<hash>/    one row per prompt, what the teacher drew for it, the column "samples"
    encoders-<hash>/   the encoders' own weights while they are out of memory (`sublimate.training.parking`)
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.edit_attachment import detached
from sublimate.pipelines.finite import finite
from sublimate.pipelines.model import Model, weights_hash
from sublimate.pipelines.tokens import cut_to_fit
from sublimate.training.ahead import ahead
from sublimate.training.captioned import Images
from sublimate.training.precision import float32_products
from sublimate.training.shards import INDEX, Compute, Shards, table
from sublimate.training.together import accelerator, everywhere

REMEMBERED_BYTES = 2**30
FORMAT = 1
"""Counts up when the same prompts and pictures come to be encoded differently."""

log = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Cache:
    """Where tables lie, and how large their files get."""

    folder: Path
    shard_bytes: int
    progress: bool = True

    def table(self, what: str, rows: int, compute: Compute, **key: Any) -> Shards:
        """A table for what its rows depend on."""
        key = {"format": FORMAT, "rows": rows, **key}
        folder = self._folder(what, key)
        return table(
            folder,
            rows,
            compute,
            key,
            shard_bytes=self.shard_bytes,
            processes=accelerator().num_processes,
            progress=self.progress,
        )

    def drawn(self, what: str, rows: int, draw: Callable[[], Tensor], **key: Any) -> Tensor:
        """What all processes draw together, (rows, ...) on the CPU; drawn, and stored, where it is not stored yet."""
        stored = self._folder(what, {"format": FORMAT, "rows": rows, **key}) / INDEX
        new = None if everywhere(stored.is_file()) else draw().cpu()

        def row(place: int) -> dict[str, Tensor]:
            if new is None:
                raise ValueError(f"{stored} was deleted while it was read: run the same command again.")
            return {what: new[place]}

        found = self.table(what, rows, lambda places: map(row, places), **key)
        return found.rows(range(rows))[what] if new is None else new

    def _folder(self, what: str, key: dict[str, Any]) -> Path:
        return self.folder / f"{what}-{digest({**key, 'float32 products': float32_products()})[:32]}"


class Remembered(Generic[Key]):
    """Tensors by key; the most recently used are kept in memory.

    Args:
        compute: what belongs to each of several keys, on the CPU.
        limit: bytes to keep.
    """

    def __init__(
        self, compute: Callable[[Sequence[Key]], Iterable[dict[str, Tensor]]], limit: int = REMEMBERED_BYTES
    ) -> None:
        self.compute, self.limit, self.held = compute, limit, 0
        self._kept: OrderedDict[Key, dict[str, Tensor]] = OrderedDict()

    def rows(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        """Every entry of the keys, stacked."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._kept]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        found |= zip(missing, self.compute(missing), strict=True)
        for key in keys:
            self._keep(key, found[key])
        return {name: torch.stack([found[key][name] for key in keys]) for name in found[keys[0]]}

    def _keep(self, key: Key, row: dict[str, Tensor]) -> None:
        if key not in self._kept:
            self._kept[key] = row
            self.held += _bytes(row)
        self._kept.move_to_end(key)
        while self.held > self.limit and len(self._kept) > 1:
            self.held -= _bytes(self._kept.popitem(last=False)[1])


class Prompts:
    """The conditions of prompts.

    Args:
        model: its text encoders stay as they are.
        texts: the prompts that will be asked for, when they are to be stored.
        cache: where to store them; None keeps them in memory.
        truncate: cut prompts that are too long, and log how many those are, instead of refusing them.
    """

    def __init__(
        self, model: Model, texts: Sequence[str] = (), cache: Cache | None = None, *, truncate: bool = False
    ) -> None:
        self.table: Shards | None = None
        encode = _Cutting(model) if truncate else lambda text: encode_prompt(model, text)
        if cache is None:
            self.memory: Remembered[str] = Remembered(lambda prompts: map(encode, prompts))
            return
        different = list(dict.fromkeys(texts))
        self.places = {text: row for row, text in enumerate(different)}
        self.table = cache.table(
            "prompts",
            len(different),
            lambda rows: (encode(different[row]) for row in rows),
            prompts=digest(different),
            encoders=encoders_hash(model),
            precision=str(model.dtype),
            # What was cut is refused where nothing may be.
            **({"truncate": True} if truncate else {}),
        )

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """What the network is told for each prompt, on the CPU."""
        if self.table is None:
            return Condition(self.memory.rows(prompts))
        return Condition(self.table.rows([self.places[text] for text in prompts]))


class UnattachedPrompts(Prompts):
    """The conditions of prompts as the model's text encoders make them without what edits attached to them."""

    def __init__(
        self, model: Model, texts: Sequence[str] = (), cache: Cache | None = None, *, truncate: bool = False
    ) -> None:
        self.model = model
        with detached(model):
            super().__init__(model, texts, cache, truncate=truncate)

    def __call__(self, prompts: Sequence[str]) -> Condition:
        with detached(self.model):
            return super().__call__(prompts)


class _Cutting:
    """Encodes prompts, cut to what the text encoders read, and logs at each doubling how many had to be."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.cut: set[str] = set()

    def __call__(self, text: str) -> dict[str, Tensor]:
        with cut_to_fit() as cut:
            encoded = encode_prompt(self.model, text)
        if cut and text not in self.cut:
            self.cut.add(text)
            if (count := len(self.cut)).bit_count() == 1:
                log.warning(
                    "%d of the prompts encoded so far %s longer than the text encoder reads and cut to fit.",
                    count,
                    "was" if count == 1 else "were",
                )
        return encoded


class Latents:
    """The latents of images, by row.

    Args:
        model: its autoencoder stays as it is.
        images: the images.
        cache: where to store their latents; None keeps them in memory as far as there is room.
    """

    def __init__(self, model: Model, images: Images, cache: Cache | None = None) -> None:
        self.count = len(images)
        self.source: Remembered[int] | Shards

        def compute(rows: Sequence[int]) -> Iterator[dict[str, Tensor]]:
            return ({"latents": encode_image(model, image)} for image in ahead(images.image, rows))

        if cache is None:
            self.source = Remembered(compute)
        else:
            key = {"images": images.identity(), "encoders": encoders_hash(model), "precision": str(model.dtype)}
            self.source = cache.table("latents", self.count, compute, **key)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.source.rows(indices.tolist())["latents"]


def encode_prompt(model: Model, text: str) -> dict[str, Tensor]:
    """One prompt's condition, without its batch dimension, on the CPU."""
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        condition = model.encode_prompts([text])
    return {name: finite(model, value, "text encoder's states")[0].cpu() for name, value in condition.items()}


def encode_image(model: Model, image: Tensor) -> Tensor:
    """The latents (channels, height, width) of an image (3, height, width) in [0, 1], on the CPU."""
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        return finite(model, model.encode(image[None].to(model.device)), "encoded pictures")[0].cpu()


def encode_images(model: Model, images: Tensor, batch: int = 64) -> Tensor:
    """Latents of images (N, 3, height, width) that are in memory, on the CPU."""
    with torch.no_grad():
        return torch.cat([model.encode(part.to(model.device)).cpu() for part in images.split(batch)])


def encoder_names(model: Model) -> list[str]:
    """The networks that make conditions and latents: all but the denoiser."""
    return [name for name in model.components() if name != model.backbone.network_attribute]


def encoders_hash(model: Model) -> str:
    """SHA-256 of all that encodes: weights, configurations, tokenizers, and what edits attached to the model."""
    modules = {name: model.component(name) for name in encoder_names(model)}
    weights = {f"{name}/{key}": p.detach() for name, m in modules.items() for key, p in sorted(m.named_parameters())}
    return digest(
        [
            weights_hash(weights.items()),
            type(model.backbone).__name__,
            {name: _config(module) for name, module in modules.items()},
            {name: _tokenizer(part) for name, part in sorted(model.pipeline.components.items()) if _tokenizer(part)},
            [installed.attachment.digest for installed in model.attached],
        ]
    )


def digest(value: object) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _config(module: Any) -> dict[str, Any]:
    """A network's configuration without where it came from and what wrote it."""
    values = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    return {k: v for k, v in values.items() if not k.startswith("_") and k != "transformers_version"}


def _tokenizer(part: Any) -> list[Any]:
    """What a tokenizer does; nothing for another component."""
    if not hasattr(part, "get_vocab"):
        return []
    backend = getattr(part, "backend_tokenizer", None)
    # Padding and truncation are left over from the last call.
    rules = {} if backend is None else json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    return [part.model_max_length, part.get_vocab(), rules]


def _bytes(row: dict[str, Tensor]) -> int:
    return sum(value.nbytes for value in row.values())
