"""The whole path on Ink: erase a concept, distil the edited teacher to one step, measure both, write a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    concept: Annotated[str, typer.Argument(help="A digit, an ink or a style of Ink.")] = "seven",
    out: Annotated[Path, typer.Option(help="Folder for the edit, the student and the report.")] = Path("runs/demo"),
    method: Annotated[str, typer.Option(help="An eraser of `sublimate methods`.")] = "uce",
    n: Annotated[int, typer.Option(min=8, help="Prompts per model, over all roles.")] = 300,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change the distillation: key=value.")] = None,
) -> None:
    """Erase a concept from Ink's teacher, distil the result to one step, and measure both; about 8 minutes."""
    from sublimate.evaluation.ink_demo import run_demo

    page = run_demo(concept, out, method=method, n=n, overrides=overrides or (), say=typer.echo)
    typer.echo(f"Wrote {page}")
