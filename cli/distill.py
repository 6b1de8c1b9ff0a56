"""Distil a multi-step teacher into a one-step student that stock diffusers loads."""

from __future__ import annotations

from typing import Annotated

import typer

SAVING_MEMORY = (
    "lower trainer.train_batch_size and raise trainer.gradient_accumulation_steps, or set dtype=bfloat16, "
    "trainer.gradient_checkpointing=true or objective.student.kind=lora; --dry-run counts"
)


def command(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, as key.sub=value.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and its counted cost, and stop.")
    ] = False,
) -> None:
    """Distil a teacher into a student; run the same command again to resume.

    On several processes: accelerate launch -m sublimate.cli distill CONFIG
    """
    from accelerate import PartialState

    from sublimate.training.config import dump_config, load_config
    from sublimate.training.distill import DistillConfig, distill

    asked = load_config(DistillConfig, config, overrides or (), kind="distill")
    passes = asked.passes()
    if dry_run:
        import torch

        from sublimate.pipelines.edit import Edit
        from sublimate.pipelines.shapes import NoShapes, open_shapes
        from sublimate.training.plan import plan_distillation

        typer.echo(dump_config(asked.resolved()), nl=False)
        typer.echo(
            f"# {passes:,.0f} network passes of one sample to train (a backward pass counts 2, to inputs alone 1); "
            "the teacher's own samples, where the data ask for them, come on top"
        )
        try:
            shapes = open_shapes(
                asked.file_config or asked.model, revision=asked.revision, dtype=getattr(torch, asked.dtype)
            )
        except NoShapes as unknown:
            typer.echo(f"# operations and memory are not counted: {unknown}")
            return
        for path in asked.edits:
            Edit.load(path)  # refused now, if at all: an edited teacher costs what it did before
        for line in plan_distillation(asked, shapes).lines():
            typer.echo(f"# {line}")
        return
    typer.echo(f"Wrote {distill(asked)}; how to load it stands in its README.md.")
    # A process that leaves while the group's threads run may be aborted by them.
    PartialState().destroy_process_group()
