"""Captioned pictures on disk, in every layout that training reads; picture i is grey of value 3 i."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = ("red", "cat", "dog", "a")


def caption(i: int) -> str:
    """A caption of words that every tiny tokenizer knows, different for the first 64."""
    return " ".join(WORDS[i // 4**place % 4] for place in range(3))


def picture(i: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.fromarray(np.full((*size, 3), 3 * i, dtype=np.uint8))


def png(i: int) -> bytes:
    file = io.BytesIO()
    picture(i).save(file, "PNG")
    return file.getvalue()


def image_folder(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        picture(i).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": caption(i)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def parquet_files(folder: Path, count: int, files: int = 4) -> Path:
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(parents=True)
    for number in range(files):
        rows = [
            {"image": {"bytes": png(i), "path": None}, "text": caption(i)}
            for i in range(number * count // files, (number + 1) * count // files)
        ]
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, folder / f"{number}.parquet", row_group_size=3)
    return folder


def tar_shards(folder: Path, count: int, files: int = 4) -> Path:
    folder.mkdir(parents=True)
    for number in range(files):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for i in range(number * count // files, (number + 1) * count // files):
                for ending, content in (("png", png(i)), ("txt", caption(i).encode())):
                    info = tarfile.TarInfo(f"{i:03d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


LAYOUTS = {
    "folder": (image_folder, {}),
    "parquet": (parquet_files, {}),
    "tar": (tar_shards, {"image_column": "png", "caption_column": "txt"}),
}
