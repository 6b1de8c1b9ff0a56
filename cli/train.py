"""Train a multi-step model from scratch: Ink's autoencoder, detector and teacher."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged configuration (ink).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, as key.sub=value.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train a multi-step model from scratch; run the same command again to resume."""
    from sublimate.training.config import dump_config, load_config
    from sublimate.training.ink.train import InkConfig, train_ink

    resolved = load_config(InkConfig, config, overrides or (), kind="teacher")
    if dry_run:
        typer.echo(dump_config(resolved), nl=False)
        return
    typer.echo(f"Wrote {train_ink(resolved)}")
