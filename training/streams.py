"""Batches from data that are read from start to end: shuffled, shared among processes, and resumed exactly.

A stream is read in lanes, its files dealt out among them. Sample g of the global batch always reads from the same
lane, so that a process opens the lanes of its own samples alone; where there are too few files for that, a lane's
processes all read it and each decodes its own rows. How many lanes there are depends on the number of files and the
global batch alone: two processes read together what one would.

A lane is shuffled within windows of so many rows, whose order depends on the seed, the lane and the window's number.
So the place of a lane is small: where its window starts in the files, and how much of it was used. Resuming reads the
window again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from sublimate.pipelines.model import Model
from sublimate.training.ahead import ahead
from sublimate.training.captioned import Framing
from sublimate.training.data import Encode, condition_of, shown_of
from sublimate.training.encoding import Prompts, encode_image
from sublimate.training.objective import Batch
from sublimate.training.randomness import SampleRandom, key


class Part(Protocol):
    """Rows from a start to an end, and where the next one is."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...

    def place(self) -> dict[str, Any]: ...

    def seek(self, place: Mapping[str, Any]) -> None: ...


class Stream(Protocol):
    """Captioned pictures in parts that can be read apart."""

    name: str

    @property
    def parts(self) -> int: ...

    def part(self, index: int, of: int) -> Part: ...

    def picture(self, row: Mapping[str, Any]) -> Image.Image:
        """A row's picture in RGB; threads ask for several at once."""
        ...

    def caption(self, row: Mapping[str, Any]) -> str: ...


class Lane:
    """One part of a stream, again and again, in shuffled windows.

    Args:
        stream: the stream.
        index, of: which of how many parts.
        window: rows that are shuffled among each other; they are in memory as the files hold them.
        seed: of the order.
        place: where to go on, as `place` said.

    Raises:
        ValueError: when the part has no rows.
    """

    def __init__(
        self, stream: Stream, index: int, of: int, *, window: int, seed: int, place: Mapping[str, Any] | None = None
    ) -> None:
        self.stream, self.index, self.of, self.size, self.seed = stream, index, of, window, seed
        self.part = stream.part(index, of)
        if place is not None:
            self.part.seek(place["files"])
        self._endless = self._again_and_again(whole=place is None)
        self.window = 0 if place is None else place["window"]
        self._fill()
        self.used = 0 if place is None else place["used"]

    def __next__(self) -> tuple[int, Mapping[str, Any]]:
        """A number that no other row of the lane has, and the row."""
        if self.used == self.size:
            self.window += 1
            self._fill()
        row = self.order[self.used]
        self.used += 1
        return self.window * self.size + row, self.rows[row]

    def place(self) -> dict[str, Any]:
        """Where the lane is, as JSON."""
        return {"files": self.start, "window": self.window, "used": self.used}

    def _fill(self) -> None:
        self.start, self.used = self.part.place(), 0
        self.rows: list[Mapping[str, Any]] = []  # the old window goes before the new one comes
        self.rows = list(islice(self._endless, self.size))
        generator = torch.Generator().manual_seed(key(self.seed, "window", self.of, self.index, self.window))
        self.order: list[int] = torch.randperm(self.size, generator=generator).tolist()

    def _again_and_again(self, *, whole: bool) -> Iterator[Mapping[str, Any]]:
        while True:
            empty = True
            for row in self.part:
                empty = False
                yield row
            if empty and whole:
                raise ValueError(f"Part {self.index + 1} of {self.of} of {self.stream.name} has no rows: remove it.")
            self.part, whole = self.stream.part(self.index, self.of), True


class StreamSource:
    """Captioned pictures of a stream, as a training on a model reads them.

    Args:
        model: encodes captions and images, one at a time.
        stream: the rows.
        framing: the images' size.
        global_batch: samples that all processes draw together at a time.
        window: rows that are in memory, of all lanes together; those of one lane are shuffled among each other.
        mirrored: draw half of the images mirrored.
        negatives: as in `ModelSource`.
        captions, images: whether they are read.
        seed: of the order.
        encode: encodes the captions instead of the model.
    """

    def __init__(
        self,
        model: Model,
        stream: Stream,
        framing: Framing,
        *,
        global_batch: int,
        window: int,
        mirrored: bool = False,
        negatives: Sequence[str] = (),
        captions: bool = True,
        images: bool = True,
        seed: int = 0,
        encode: Encode | None = None,
    ) -> None:
        self.model, self.stream, self.framing, self.negatives = model, stream, framing, list(negatives)
        self.mirrored, self.seed = mirrored, seed
        self.captions, self.images = captions, images or bool(model.backbone.shown)
        self.encode: Encode = encode or Prompts(model)
        self.lanes = math.gcd(global_batch, stream.parts)
        self.window = -(-window // self.lanes)  # a lane's share
        self.per_lane = global_batch // self.lanes
        self._places: dict[str, Any] = {}
        self._open: dict[int, Lane] = {}

    @property
    def provides(self) -> frozenset[str]:
        shown = self.model.backbone.shown
        given = {
            "prompts": self.captions,
            "images": self.images,
            "negatives": bool(self.negatives),
            shown: bool(shown),
        }
        return frozenset(name for name, present in given.items() if present)

    def identity(self) -> list[Any]:
        """Negative prompts; captions are the stream's."""
        return [self.negatives]

    def batch(self, random: SampleRandom) -> Batch:
        """The next rows; their order is the stream's, what else is drawn is `random`'s."""
        numbers, rows = zip(*self._rows(random.indices), strict=True)
        texts = [self.stream.caption(row) for row in rows] if self.captions else []
        condition = condition_of(self.encode, texts, self.negatives, random)
        if not self.images:
            return Batch(condition, random)
        mirrored = random.integers(1 + self.mirrored).bool().tolist()

        def framed(place: int) -> Tensor:
            picture = self.stream.picture(rows[place])
            return self.framing(picture, numbers[place], mirrored=mirrored[place])

        images = [*ahead(framed, range(len(rows)))]
        if self.model.backbone.shown:
            condition = shown_of(self.model, condition, torch.stack(images), random)
        latents = torch.stack([encode_image(self.model, image) for image in images])
        return Batch(condition, random, {"images": latents})

    def place(self) -> dict[str, Any]:
        """Where the lanes that this process reads are, as JSON: {lane: place}."""
        # Before the first batch it is not known which those are.
        return {str(index): lane.place() for index, lane in self._open.items()} or dict(self._places)

    def seek(self, place: Mapping[str, Any]) -> None:
        """Goes on where the lanes, of all processes, were; with nothing, at the start."""
        self._places, self._open = dict(place), {}

    def _rows(self, indices: Sequence[int]) -> list[tuple[int, Mapping[str, Any]]]:
        """The rows of some samples of the global batch; a lane moves on by what all of its samples read."""
        where = [divmod(index % (self.lanes * self.per_lane), self.per_lane) for index in indices]
        taken = {lane: [next(self._lane(lane)) for _ in range(self.per_lane)] for lane in {lane for lane, _ in where}}
        return [(self.lanes * taken[lane][i][0] + lane, taken[lane][i][1]) for lane, i in where]

    def _lane(self, index: int) -> Lane:
        if index not in self._open:
            options = {"window": self.window, "seed": self.seed, "place": self._places.pop(str(index), None)}
            self._open[index] = Lane(self.stream, index, self.lanes, **options)
        return self._open[index]
