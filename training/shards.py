"""Tables of tensors on disk, computed row by row, continued after a kill, and read back through memory maps.

Layout of a table's folder:

    00000.safetensors, 00001.safetensors, ...   consecutive rows; every column is one tensor (rows, ...)
    index.json                                  {"key": ..., "shards": [{"file", "rows", "bytes"}, ...]}
    .lock                                       held by the process that writes

Each file is written aside, synced to the disk and renamed. `index.json` comes last: without it the table is
unfinished, and the shards that are there are where the next run continues. Readers take no lock.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from sublimate.pipelines.folders import file_written_aside

INDEX = "index.json"
Compute = Callable[[Sequence[int]], Iterable[Mapping[str, Tensor]]]


class Shards:
    """A finished table. Its files are mapped into memory: of a row that nobody reads, nothing is.

    Args:
        folder: the table's folder.

    Raises:
        ValueError: when it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.index = json.loads((folder / INDEX).read_text())
            self.files = [(folder / shard["file"], shard["rows"]) for shard in self.index["shards"]]
            whole = all((folder / s["file"]).stat().st_size == s["bytes"] for s in self.index["shards"])
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"The cache {folder} is damaged ({error}): delete it to have it made again.") from error
        if not whole:
            raise ValueError(f"The cache {folder} is damaged, a file was cut off: delete it to have it made again.")
        self.starts = torch.tensor([0, *(rows for _, rows in self.files)]).cumsum(0)
        self._mapped: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Some rows of every column, (len(rows), ...), in memory of their own."""
        places = torch.searchsorted(self.starts, torch.tensor(rows), right=True) - 1
        found = [
            {name: column[row - int(self.starts[shard])] for name, column in self._columns(shard).items()}
            for row, shard in zip(rows, places.tolist(), strict=True)
        ]
        return {name: torch.stack([row[name] for row in found]) for name in found[0]}

    def _columns(self, shard: int) -> dict[str, Tensor]:
        if shard not in self._mapped:
            self._mapped[shard] = read_mapped(self.files[shard][0])
        return self._mapped[shard]


def table(
    folder: Path,
    rows: int,
    compute: Compute,
    key: Mapping[str, Any],
    *,
    shard_bytes: int,
    progress: bool = True,
) -> Shards:
    """The table that lies in `folder`; what is missing is computed and written first, in row order.

    Of several processes that ask for one table, one writes and the others wait for it; when it is killed, another
    continues.

    Args:
        folder: the table's own folder, whose name says what the key is.
        rows: how many the table has.
        compute: rows in the order that is asked for: of each a tensor for every column, of the same shapes as others'.
        key: what the rows depend on, as JSON; written to the index.
        shard_bytes: the most that a shard's tensors measure, if one row is not larger.
        progress: show a bar while computing.

    Raises:
        ValueError: when the folder is damaged or holds another table.
    """
    if not (folder / INDEX).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not (folder / INDEX).is_file():
                _write(folder, rows, compute, key, shard_bytes, progress)
    found = Shards(folder)
    if found.index["key"] != json.loads(json.dumps(key)) or len(found) != rows:
        raise ValueError(f"The cache {folder} holds something else: delete it to have it made again.")
    return found


def read_mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped: their memory is the file's, and given up when others need it.

    Raises:
        ValueError: when the file is damaged.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete its folder to have it made again.") from error


def _write(
    folder: Path, rows: int, compute: Compute, key: Mapping[str, Any], shard_bytes: int, progress: bool
) -> None:
    for half in folder.glob(".*.partial"):
        half.unlink()
    shards: list[dict[str, Any]] = []
    while (file := folder / _name(len(shards))).is_file():
        shards.append(_entry(file))
    done = sum(shard["rows"] for shard in shards)
    missing = iter(compute(range(done, rows)))
    with tqdm(total=rows, initial=done, desc=folder.name.partition("-")[0], disable=not progress) as bar:
        while done < rows:
            file = folder / _name(len(shards))
            columns = _next_columns(missing, rows - done, shard_bytes, bar)
            with file_written_aside(file) as aside:
                save_file(columns, aside)
            shards.append(_entry(file))
            done += shards[-1]["rows"]
    with file_written_aside(folder / INDEX) as aside:
        aside.write_text(json.dumps({"key": key, "shards": shards}, indent=1))


def _next_columns(rows: Iterator[Mapping[str, Tensor]], left: int, shard_bytes: int, bar: tqdm) -> dict[str, Tensor]:
    """The next shard's columns, filled in place: a shard is in memory once."""
    first = next(rows)
    count = min(left, max(1, shard_bytes // sum(value.nbytes for value in first.values())))
    columns = {name: torch.empty((count, *value.shape), dtype=value.dtype) for name, value in first.items()}
    for place, row in enumerate(chain([first], islice(rows, count - 1))):
        for name, value in row.items():
            columns[name][place] = value
        bar.update()
    return columns


def _name(shard: int) -> str:
    return f"{shard:05d}.safetensors"


def _entry(file: Path) -> dict[str, Any]:
    column = next(iter(read_mapped(file).values()))
    return {"file": file.name, "rows": len(column), "bytes": file.stat().st_size}
