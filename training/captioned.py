"""Captioned pictures with random access: what they are, a folder of files, and how a picture gets its size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sublimate.training.ahead import ahead
from sublimate.training.randomness import key


class Captioned(Protocol):
    """Pictures by row."""

    @property
    def captions(self) -> Sequence[str]:
        """One per row; empty when none are read."""
        ...

    def __len__(self) -> int: ...

    def picture(self, row: int) -> Image.Image:
        """One picture in RGB; threads ask for several at once.

        Raises:
            ValueError: when it is missing or damaged, naming file or row.
        """
        ...

    def identity(self) -> str:
        """What changes when a picture or their order does; found without reading them."""
        ...


class ImageFolder:
    """A folder laid out like Hugging Face's `imagefolder`; nothing but files.

    `metadata.jsonl` has one JSON object a line: `file_name`, a picture's path from the folder, and its caption.

    Args:
        folder: the folder.
        caption_column: what its captions are called; None reads none.

    Raises:
        FileNotFoundError: when there is no metadata.jsonl.
        ValueError: when it is empty, or a line is not as expected, naming the line.
    """

    def __init__(self, folder: Path, caption_column: str | None = "text") -> None:
        self.folder, self.metadata = folder, folder / "metadata.jsonl"
        if not self.metadata.is_file():
            raise FileNotFoundError(
                f"{folder} has no metadata.jsonl: one JSON line with file_name and {caption_column or 'no more'} per "
                "picture."
            )
        self.names: list[str] = []
        self.lines: list[int] = []
        self.captions: list[str] = []
        with self.metadata.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._read(line, number, caption_column)
        if not self.names:
            raise ValueError(f"{self.metadata} is empty: write one JSON line per picture.")

    def _read(self, line: str, number: int, caption_column: str | None) -> None:
        where = f"Line {number} of {self.metadata}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error.msg}): {line.strip()[:80]}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f"{where} names no picture as file_name: {line.strip()[:80]}")
        self.names.append(row["file_name"])
        self.lines.append(number)
        if caption_column is not None:
            self.captions.append(caption_of(row, caption_column, where))

    def __len__(self) -> int:
        return len(self.names)

    def picture(self, row: int) -> Image.Image:
        path = self.folder / self.names[row]
        return decoded(path, f"{path} (line {self.lines[row]} of metadata.jsonl)")

    def identity(self) -> str:
        """Names, sizes and times of change."""
        digest = hashlib.sha256()
        for name, line in zip(self.names, self.lines, strict=True):
            try:
                found = (self.folder / name).stat()
            except OSError as error:
                raise ValueError(
                    f"There is no picture {self.folder / name} (line {line} of metadata.jsonl)."
                ) from error
            digest.update(json.dumps([name, found.st_size, found.st_mtime_ns]).encode())
        return digest.hexdigest()


def caption_of(row: dict[str, object], column: str, where: str) -> str:
    """A row's caption.

    Raises:
        ValueError: when the row has none.
    """
    if column not in row:
        raise ValueError(f"{where} has no caption column {column!r}, only {', '.join(row)}: set data.caption_column.")
    caption = row[column]
    if isinstance(caption, bytes):
        caption = caption.decode("utf-8")
    if not isinstance(caption, str):
        raise ValueError(f"{where} has the caption {caption!r}, which is no text: correct it or leave the row out.")
    return caption


def decoded(picture: Path | bytes, where: str) -> Image.Image:
    """A picture file in RGB, upright.

    Args:
        picture: its path, or its bytes.
        where: what to call it in messages.

    Raises:
        ValueError: when it is missing, or no picture, or a damaged one.
    """
    try:
        with Image.open(BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"There is no picture {where}.") from error
    # Pillow tells of damage in many ways.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"The picture {where} cannot be read ({error}): repair it or leave the row out.") from error


@dataclass(frozen=True)
class Framing:
    """How pictures of any size become images of one size: shrunk or enlarged until they cover it, then cropped.

    Attributes:
        height, width: of the images, in pixels.
        center_crop: crop the middle; otherwise a place that depends on seed and row alone.
        seed: of those places.
    """

    height: int
    width: int
    center_crop: bool = False
    seed: int = 0

    def __call__(self, picture: Image.Image, row: int, *, mirrored: bool = False) -> Tensor:
        """A row's picture as (3, height, width) in [0, 1]."""
        scale = max(self.height / picture.height, self.width / picture.width)
        size = max(self.width, round(scale * picture.width)), max(self.height, round(scale * picture.height))
        if size != picture.size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        spare = size[0] - self.width, size[1] - self.height
        place = key(self.seed, "crop", row)
        left, top = (
            (spare[0] // 2, spare[1] // 2) if self.center_crop else (place % (spare[0] + 1), place % (spare[1] + 1))
        )
        pixels = np.asarray(picture.crop((left, top, left + self.width, top + self.height)), dtype=np.float32) / 255
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        return image.flip(2) if mirrored else image


class Images:
    """Captioned pictures as images, each twice when mirrored ones are wanted: image 2 i + 1 is 2 i mirrored.

    Args:
        rows: the pictures.
        framing: their size.
        mirrored: also mirrored.
    """

    def __init__(self, rows: Captioned, framing: Framing, *, mirrored: bool = False) -> None:
        self.rows, self.framing, self.copies = rows, framing, 1 + mirrored
        self.captions = [caption for caption in rows.captions for _ in range(self.copies)]

    def __len__(self) -> int:
        return self.copies * len(self.rows)

    def image(self, index: int) -> Tensor:
        """(3, height, width) in [0, 1]."""
        row, copy = divmod(index, self.copies)
        return self.framing(self.rows.picture(row), row, mirrored=copy == 1)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return torch.stack([*ahead(self.image, indices.tolist())])

    def identity(self) -> dict[str, object]:
        """What the images depend on, as JSON."""
        return {"pictures": self.rows.identity(), "copies": self.copies, **asdict(self.framing)}
