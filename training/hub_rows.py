"""Captioned pictures through Hugging Face `datasets`, the extra `[data]`: by row, or as a stream with a place."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from sublimate.training.captioned import caption_of, decoded
from sublimate.training.data_config import DataConfig

# What a folder may hold, and the loader that reads it.
_LOADERS = {"*.parquet": "parquet", "*.tar": "webdataset"}


# What pyarrow says of a parquet file without rows.
_NO_ROWS = "BatchSize must be greater than 0"


def load(data: DataConfig) -> Any:
    """The `datasets.Dataset` or, when streaming, `IterableDataset` that a configuration names; pictures undecoded.

    Raises:
        ValueError: when the extra is not installed, or there is no such data set, or it lacks the column of pictures.
    """
    name = _name(data)
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"Reading {name} needs Hugging Face datasets: install the extra, pip install 'sublimate[data]'."
        ) from error
    options: dict[str, Any] = {"split": "train", "streaming": data.streaming}
    if data.cache_dir is not None:
        options["cache_dir"] = str(data.cache_dir / "datasets")
    if data.train_data_dir is not None:
        path, options["data_files"] = _files(data.train_data_dir)
    else:
        path, options["name"] = name, data.dataset_config_name
    try:
        found = datasets.load_dataset(path, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        if _NO_ROWS in reason:
            raise ValueError(f"{name} has no rows: give another.") from error
        raise ValueError(f"{name} cannot be read: {reason.removesuffix('.')}.") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be read: {reason.removesuffix('.')}.") from error
    columns = found.column_names
    if columns is None:
        return found
    options_of = {"image_column": data.image_column, "caption_column": data.caption_column}
    if data.images == "teacher":  # it draws its own
        del options_of["image_column"]
    wanted = {option: column for option, column in options_of.items() if column is not None}
    for option, column in wanted.items():
        if column not in columns:
            raise ValueError(f"{name} has no column {column!r}, only {', '.join(columns)}: set data.{option}.")
    found = found.select_columns(list(wanted.values()))
    if "image_column" not in wanted:
        return found
    return found.cast_column(data.image_column, datasets.Image(decode=False))


class DatasetRows:
    """A data set that is stored, by row.

    Args:
        data: names the data set and its columns.

    Raises:
        ValueError: as `load`; when it is empty, or a caption is none.
    """

    def __init__(self, data: DataConfig) -> None:
        self.name, self.dataset = _name(data), load(data)
        self.image_column, self._reading = data.image_column, threading.Lock()
        if not len(self.dataset):
            raise ValueError(f"{self.name} has no rows: give another data set.")
        self.captions: list[str] = []
        if (column := data.caption_column) is not None:
            for row, caption in enumerate(self.dataset[column]):
                self.captions.append(caption_of({column: caption}, column, f"Row {row} of {self.name}"))

    def __len__(self) -> int:
        return len(self.dataset)

    def picture(self, row: int) -> Image.Image:
        # Pictures are decoded by several threads, and `datasets` does not say that several may read.
        with self._reading:
            found = self.dataset[row]
        return _picture(found, self.image_column, f"in row {row} of {self.name}")

    def identity(self) -> str:
        """The fingerprint that `datasets` gives the data's files and what was done to them."""
        return str(self.dataset._fingerprint)


class DatasetStream:
    """A data set that is read from its start to its end, in parts that can be read apart.

    Args:
        data: names the data set and its columns.

    Raises:
        ValueError: as `load`.
    """

    def __init__(self, data: DataConfig) -> None:
        self.name, self.dataset = _name(data), load(data)
        self.image_column, self.caption_column = data.image_column, data.caption_column

    @property
    def parts(self) -> int:
        """How many parts there are: the data set's files."""
        return int(self.dataset.num_shards)

    def part(self, index: int, of: int) -> Part:
        """The index-th of so many parts, from its start."""
        return Part(self.dataset.shard(num_shards=of, index=index))

    def picture(self, row: Mapping[str, Any]) -> Image.Image:
        """A row's picture in RGB.

        Raises:
            ValueError: when it is damaged.
        """
        return _picture(row, self.image_column, f"of {self.name} with the caption {self.caption(row)!r}")

    def caption(self, row: Mapping[str, Any]) -> str:
        """A row's caption; "" when none are read."""
        if self.caption_column is None:
            return ""
        return caption_of(dict(row), self.caption_column, f"A row of {self.name}")


class Part:
    """A part of a stream and how far it was read."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        # Until it is read on, `datasets` says of a data set that its place is the start.
        self._sought: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        try:
            for row in self._dataset:
                self._sought = None
                yield row
        except ValueError as error:
            if _NO_ROWS not in str(error):
                raise

    def place(self) -> dict[str, Any]:
        """Where the next row is, as JSON; nothing before the first."""
        return dict(self._dataset.state_dict() or {}) if self._sought is None else dict(self._sought)

    def seek(self, place: Mapping[str, Any]) -> None:
        """The next iteration begins at a place."""
        if place:
            self._sought = dict(place)
            self._dataset.load_state_dict(dict(place))


def _name(data: DataConfig) -> str:
    return str(data.train_data_dir or data.dataset_name)


def _files(folder: Path) -> tuple[str, list[str]]:
    """The loader of a folder, and its files in order."""
    for pattern, loader in _LOADERS.items():
        if found := sorted(str(path) for path in folder.glob(pattern)):
            return loader, found
    raise ValueError(
        f"{folder} holds no captioned pictures: give a folder with metadata.jsonl, parquet files or webdataset shards."
    )


def _picture(row: Mapping[str, Any], column: str, where: str) -> Image.Image:
    value = row.get(column)
    if isinstance(value, dict):
        value = value.get("bytes") or (value.get("path") and Path(value["path"]))
    if not isinstance(value, bytes | Path):
        raise ValueError(f"There is no picture {where}: its column {column!r} is {value!r}.")
    return decoded(value, where)
