"""What a run's `data:` section says, named as in diffusers' training scripts where they have such options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from sublimate.training.config import Config

__all__ = ["DataConfig"]


class DataConfig(Config):
    """Where prompts and images come from.

    With `train_data_dir` or `dataset_name`, captioned pictures: `prompts` and `images` are then null unless given.

    Attributes:
        prompts: "ink" for captions of Ink's grammar, or a text or JSON-lines file; None for an unconditional model,
            and for captioned pictures.
        images: the real class and the data of objectives that read images: "teacher" for the (edited) teacher's own
            guided samples, "ink" for renderings; None for captioned pictures, or for none.
        negatives: negative prompts for objectives that need them: "ink" for Ink's own concepts, or a text file.
        count: captions and images to draw when they come from "ink" or "teacher"; of a file with more prompts, as many
            are picked at random for the teacher to draw.
        teacher_steps: sampling steps of the teacher's own samples.
        teacher_guidance_scale: their classifier-free guidance; None is the objective's own.
        seed: seed of those draws, of a stream's order, and of where pictures are cropped.
        train_data_dir: a folder of pictures with `metadata.jsonl`, of parquet files or of webdataset tar shards. All
            but the first need the extra `[data]`.
        dataset_name: a data set of the hub, or a folder that `datasets.load_dataset` reads; needs the extra `[data]`.
        dataset_config_name: its configuration.
        streaming: read it from its start to its end again and again instead of at random, without storing it.
        shuffle_buffer_size: rows of a stream that are held in memory undecoded, by all processes, and shuffled:
            its files are read side by side, and each mixes its share.
        image_column: the column with pictures; a folder with `metadata.jsonl` always has them under `file_name`.
        caption_column: the column with captions; None for an unconditional model.
        truncate_prompts: cut captions and prompts that are longer than a text encoder reads, as diffusers' training
            scripts do, and log how many those are; otherwise the first of them ends the run.
        resolution: pixels of the pictures' sides; None is the model's own size.
        center_crop: crop the middle of a picture; otherwise a place that is drawn once for each, or in each pass of a
            stream. Needed for models that are told where a picture was cropped (Stable Diffusion XL).
        random_flip: draw half of the pictures mirrored.
        cache_dir: where what the text encoders and the autoencoder make of the data is stored, so that they leave the
            memory during training, and what the teacher draws, so that a resumed run does not draw it again; None
            stores nothing. It changes no result.
        cache_shard_bytes: the largest file in there; each process needs about twice as much memory to write one.
    """

    prompts: str | None = "ink"
    images: str | None = "teacher"
    negatives: str | None = None
    count: int = Field(default=4096, ge=1)
    teacher_steps: int = Field(default=25, ge=1)
    teacher_guidance_scale: float | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    train_data_dir: Path | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    streaming: bool = False
    shuffle_buffer_size: int = Field(default=1000, ge=1)
    image_column: str = "image"
    caption_column: str | None = "text"
    truncate_prompts: bool = False
    resolution: int | None = Field(default=None, ge=1)
    center_crop: bool = False
    random_flip: bool = False
    cache_dir: Path | None = None
    cache_shard_bytes: int = Field(default=256 * 2**20, ge=1)

    @property
    def captioned(self) -> bool:
        """Whether captioned pictures are named."""
        return self.train_data_dir is not None or self.dataset_name is not None

    def lasting(self) -> dict[str, Any]:
        """The options that results depend on, as JSON."""
        # What `truncate_prompts` changes would have ended the run, which may then be resumed with it. Of prompts what
        # they say counts, and not where (`Named.identity`).
        left_out = {"cache_dir", "cache_shard_bytes", "truncate_prompts", "prompts", "negatives"}
        return self.model_dump(mode="json", exclude=left_out)

    @model_validator(mode="before")
    @classmethod
    def _brings_captions(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and any(data.get(key) for key in ("train_data_dir", "dataset_name")):
            return {"prompts": None, "images": None, **data}
        return data

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.train_data_dir is not None and self.dataset_name is not None:
            raise ValueError("train_data_dir and dataset_name both name the data: give one of them.")
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError("dataset_config_name is a configuration of dataset_name: give that too.")
        if self.captioned and self.prompts is not None:
            raise ValueError("Captioned pictures bring their own captions: set data.prompts to null.")
        if self.captioned and self.images not in (None, "teacher"):
            raise ValueError(f"Captioned pictures cannot be joined with images of {self.images!r}: leave those out.")
        if unread := [name for name in self._unread() if self._given(name)]:
            raise ValueError(f"{unread[0]} is of captioned pictures, and none are read: leave it out.")
        if not self.streaming and self._given("shuffle_buffer_size"):
            raise ValueError("shuffle_buffer_size is of a stream: set streaming, or leave it out.")
        if self.images not in (None, "teacher", "ink"):
            raise ValueError(
                f"images is {self.images!r}, not teacher, ink or null: a folder of pictures is data.train_data_dir."
            )
        if self.streaming:
            self._streams()
        return self

    def _unread(self) -> tuple[str, ...]:
        """The options that nothing reads: without captioned pictures, or where the teacher draws its own."""
        pictures = ("image_column", "resolution", "center_crop", "random_flip")
        if not self.captioned:
            return ("caption_column", *pictures)
        return pictures if self.images == "teacher" else ()

    def _given(self, name: str) -> bool:
        """Whether an option has another value than its default."""
        return getattr(self, name) != type(self).model_fields[name].default

    def _streams(self) -> None:
        if not self.captioned:
            raise ValueError("streaming is for dataset_name and train_data_dir: give one of them.")
        if self.images == "teacher":
            raise ValueError(
                "The teacher draws one image of each caption, and a stream has no end: set streaming off."
            )
        if self.cache_dir is not None:
            raise ValueError("cache_dir stores what is made of every row, and a stream has no end: leave out one.")
