"""Options of every command that opens a checkpoint."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

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
