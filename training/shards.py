"""Tables of tensors on disk, computed row by row, continued after a kill, and read back through memory maps.

Layout of a table's folder:

    00000.safetensors, 00001.safetensors, ...   consecutive rows; every column is one tensor (rows, ...)
    index.json                                  {"key": ..., "shards": [{"file", "rows", "bytes"}, ...]}
    .lock                                       held while index.json is written

Each file is written aside, synced to the disk and renamed. `index.json` comes last: without it the table is
unfinished, and the shards that are there need not be computed again. How many rows each has lies in `layout.json`
until then, so that processes can share the work: who wants a shard that is not there takes the lock of its name.
Readers take no lock.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from sublimate.pipelines.folders import file_written_aside

INDEX, LAYOUT = "index.json", "layout.json"
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
    processes: int = 1,
    progress: bool = True,
) -> Shards:
    """The table that lies in `folder`; what is missing is computed and written first, in row order.

    Of several processes that ask for one table, each computes some shards; when one is killed, others take over its.

    Args:
        folder: the table's own folder, whose name says what the key is.
        rows: how many the table has.
        compute: rows in the order that is asked for: of each a tensor for every column, of the same shapes as others'.
        key: what the rows depend on, as JSON; written to the index.
        shard_bytes: the most that a shard's tensors measure, if one row is not larger.
        processes: that ask for it, each of which finds a few shards to compute.
        progress: show a bar while computing.

    Raises:
        ValueError: when the folder is damaged or holds another table.
    """
    if not (folder / INDEX).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _fill(folder, rows, compute, key, shard_bytes, processes, progress)
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


def _fill(
    folder: Path,
    rows: int,
    compute: Compute,
    key: Mapping[str, Any],
    shard_bytes: int,
    processes: int,
    progress: bool,
) -> None:
    """Computes the shards that are missing and that no other process is at, then waits for those."""
    if (size := _rows_per_shard(folder, rows, compute, shard_bytes, processes)) is None:
        return
    parts = [range(start, min(start + size, rows)) for start in range(0, rows, size)]
    shards = {folder / _name(place): part for place, part in enumerate(parts)}
    with tqdm(total=rows, desc=folder.name.partition("-")[0], disable=not progress) as bar:
        elsewhere = [file for file, part in shards.items() if not _written(file, part, compute, bar, wait=False)]
        for file in elsewhere:
            _written(file, shards[file], compute, bar, wait=True)
    with FileLock(folder / ".lock"):
        if not (folder / INDEX).is_file():
            entries = [_entry(file, part) for file, part in shards.items()]
            with file_written_aside(folder / INDEX) as aside:
                aside.write_text(json.dumps({"key": key, "shards": entries}, indent=1))
        # Nobody is at a shard any more.
        for done in (folder / LAYOUT, *map(_lock_of, shards), *folder.glob(".*.partial")):
            done.unlink(missing_ok=True)


def _rows_per_shard(folder: Path, rows: int, compute: Compute, shard_bytes: int, processes: int) -> int | None:
    """As many as measure `shard_bytes`, which the first process finds from the first row; None when all is done."""
    with FileLock(folder / ".lock"):
        if (folder / INDEX).is_file():
            return None
        if not (folder / LAYOUT).is_file():
            one = sum(value.nbytes for row in compute(range(min(1, rows))) for value in row.values())
            most = rows if processes == 1 else -(-rows // (4 * processes))
            with file_written_aside(folder / LAYOUT) as aside:
                aside.write_text(json.dumps({"rows": max(1, min(most, shard_bytes // max(1, one)))}))
        return int(json.loads((folder / LAYOUT).read_text())["rows"])


def _written(file: Path, part: range, compute: Compute, bar: tqdm, *, wait: bool) -> bool:
    """Whether a shard is there, computed by this process unless it is or, without waiting, another is at it."""
    lock = FileLock(_lock_of(file))
    if not file.is_file():
        try:
            lock.acquire(blocking=wait)
        except Timeout:
            return False
    try:
        if file.is_file():
            _entry(file, part)
            bar.update(len(part))
            return True
        for half in file.parent.glob(f".{file.name}.*.partial"):
            half.unlink()
        with file_written_aside(file) as aside:
            save_file(_columns(compute(part), len(part), bar), aside)
        return True
    finally:
        lock.release()


def _columns(rows: Iterable[Mapping[str, Tensor]], count: int, bar: tqdm) -> dict[str, Tensor]:
    """The columns of so many rows, filled in place: a shard is in memory once."""
    columns: dict[str, Tensor] = {}
    for place, row in zip(range(count), rows, strict=True):
        for name, value in row.items():
            if place == 0:
                columns[name] = torch.empty((count, *value.shape), dtype=value.dtype)
            columns[name][place] = value
        bar.update()
    return columns


def _name(shard: int) -> str:
    return f"{shard:05d}.safetensors"


def _lock_of(file: Path) -> Path:
    return file.parent / f".{file.name}.lock"


def _entry(file: Path, part: range) -> dict[str, Any]:
    rows = len(next(iter(read_mapped(file).values())))
    if rows != len(part):
        raise ValueError(f"{file} holds {rows} rows instead of {len(part)}: delete its folder to have it made again.")
    return {"file": file.name, "rows": rows, "bytes": file.stat().st_size}
