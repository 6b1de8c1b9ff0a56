"""Options of every command that opens a checkpoint, and opening it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch

    from sublimate.pipelines.model import Model

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Variant = Annotated[str | None, typer.Option(help="Of the weights' files, such as fp16.")]
FileConfig = Annotated[
    str | None,
    typer.Option(
        help="Of a single file: a diffusers folder or hub id with its configuration, and with what it lacks."
    ),
]
FuseLora = Annotated[
    list[str] | None,
    typer.Option(
        help="A LoRA to add to the model's weights first, as SOURCE, SOURCE:FILE or either with @0.7; repeatable."
    ),
]
Edits = Annotated[list[Path] | None, typer.Option("--edit", help="An edit to apply first; repeatable.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Images at once, which changes nothing but rounding; fewer, the larger.")
]
Precision = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Precision of all weights.")
]

Device = Annotated[
    str, typer.Option(help="auto (a GPU, if there is one and ACCELERATE_USE_CPU is not 1), cpu, cuda, ...")
]


def device_as_asked(asked: str) -> torch.device:
    """The device that a command was told to use, which is printed unless it is the CPU.

    Apple's GPUs are left out of "auto": they have no float64, in which times are.

    Args:
        asked: torch's name of one, or "auto".

    Raises:
        ValueError: when there is none of that name here.
    """
    import torch

    from sublimate.training.together import accelerator

    if asked == "auto":
        device = accelerator().device
        device = torch.device("cpu") if device.type == "mps" else device
    else:
        try:
            device = torch.empty(0, device=asked).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"There is no device {asked!r} here: use auto, cpu or another that torch has.") from error
    if device.type != "cpu" and accelerator().is_main_process:
        typer.echo(f"device: {device}")
    return device


def opened_as_asked(
    source: str, dtype: str, loras: Sequence[str] | None, edits: Sequence[Path] | None, **options: Any
) -> Model:
    """The model that a command was told to open; `options` are `open_model`'s others."""
    import torch

    from sublimate.pipelines.edit import open_edited

    return open_edited(source, edits or (), dtype=getattr(torch, dtype), loras=loras or (), **options)
