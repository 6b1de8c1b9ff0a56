"""Options of every command that opens a checkpoint, and opening it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from sublimate.pipelines.model import Model

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Variant = Annotated[str | None, typer.Option(help="Of the weights' files, such as fp16.")]
FileConfig = Annotated[
    str | None,
    typer.Option(
        help="Of a single file: a diffusers folder or hub id with its configuration, and with what it lacks."
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Images at once, which changes nothing but rounding; fewer, the larger.")
]
Precision = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Precision of all weights.")
]


def opened_as_asked(
    source: str, dtype: str, loras: Sequence[str] | None, edits: Sequence[Path] | None, **options: Any
) -> Model:
    """The model that a command was told to open; `options` are `open_model`'s others."""
    import torch

    from sublimate.pipelines.edit import open_edited

    return open_edited(source, edits or (), dtype=getattr(torch, dtype), loras=loras or (), **options)
