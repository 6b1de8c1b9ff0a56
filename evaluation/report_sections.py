"""What a report is made of: verdict, tables, pictures and lists, as plain data that becomes HTML and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sublimate.evaluation.criteria import Criterion, verdict_sentence
from sublimate.evaluation.intervals import Difference, Rate, plain

Cell = str | int | float | Rate | Difference | None
"""What a table holds; None is a number that does not exist."""


@dataclass(frozen=True)
class Verdict:
    """The answer, and each measured value against its bar.

    Attributes:
        criteria: at least one.
        sentence: the answer in one sentence; written from the criteria unless given.
        note: what a reader must know to judge it.
        title: heading.
        undone: whether something else, such as an attack, undoes what the criteria say.
    """

    criteria: tuple[Criterion, ...]
    sentence: str = ""
    note: str = ""
    title: str = "Verdict"
    undone: bool = False

    def __post_init__(self) -> None:
        if not self.sentence:
            object.__setattr__(self, "sentence", verdict_sentence(self.criteria))

    @property
    def met(self) -> bool:
        """Whether every bar is met."""
        return all(criterion.met for criterion in self.criteria)

    @property
    def certain(self) -> bool:
        """Whether every interval lies on one side of its bar."""
        return all(criterion.certain for criterion in self.criteria)


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers.

    Attributes:
        title: heading.
        columns: one heading per column.
        rows: as many cells each as there are columns; the first names the row.
        note: a sentence below.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r} has {len(self.columns)} columns and a row of {len(row)}")


@dataclass(frozen=True)
class PictureRow:
    """One prompt as several models draw it.

    Attributes:
        caption: what was asked for, and with which seed.
        images: one per column of the section, (3, H, W) in [0, 1].
    """

    caption: str
    images: tuple[Tensor, ...]


@dataclass(frozen=True)
class Pictures:
    """The same prompts and seeds side by side.

    Attributes:
        title: heading.
        columns: who drew ("base", "edited", "one-step student").
        rows: at least one.
        note: a sentence below the heading.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[PictureRow, ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.images) != len(self.columns):
                raise ValueError(f"{row.caption!r} has {len(row.images)} pictures for {len(self.columns)} columns")


@dataclass(frozen=True)
class Listing:
    """A list of sentences under a heading."""

    title: str
    items: tuple[str, ...]


Section = Verdict | Table | Pictures | Listing


def section_to_dict(section: Section) -> dict[str, Any]:
    """A section as plain data for JSON; pictures by caption only."""
    match section:
        case Verdict():
            criteria = [criterion.to_dict() for criterion in section.criteria]
            content: dict[str, Any] = {"sentence": section.sentence, "met": section.met, "criteria": criteria}
        case Table():
            content = {"columns": list(section.columns), "rows": [_cells(row) for row in section.rows]}
        case Pictures():
            content = {"columns": list(section.columns), "captions": [row.caption for row in section.rows]}
        case Listing():
            return {"kind": "listing", "title": section.title, "items": list(section.items)}
    return {"kind": type(section).__name__.lower(), "title": section.title, **content, "note": section.note}


def _cells(row: Sequence[Cell]) -> list[Any]:
    return [plain(cell) if isinstance(cell, Rate | Difference) else cell for cell in row]
