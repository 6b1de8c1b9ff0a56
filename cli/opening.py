"""Options of every command that opens a checkpoint, and opening one with edits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from sublimate.pipelines.model import Model

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Variant = Annotated[str | None, typer.Option(help="Of the weights' files, such as fp16.")]
Precision = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Precision of all weights.")
]


def open_edited(
    source: str, edits: Sequence[Path] | None, dtype: str, *, loras: Sequence[str] | None, **options: Any
) -> Model:
    """A model with LoRAs and edits in it: edits belong to a base in float32, whose precision changes only then."""
    import torch

    from sublimate.pipelines.edit import Edit
    from sublimate.pipelines.model import open_model

    precision = getattr(torch, dtype)
    model = open_model(source, loras=loras or (), dtype=torch.float32 if edits else precision, **options)
    for path in edits or ():
        Edit.load(path).apply(model)
    return model.to(dtype=precision)
