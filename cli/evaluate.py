"""Measure how well a model draws: prompt agreement and, on Ink, distance to real handwriting."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sublimate.cli.opening import BatchSize, FileConfig, Precision, Revision, Variant, opened_as_asked


def command(
    model: Annotated[str, typer.Argument(help="A packaged name (ink, ink_one_step), a folder, a file or a hub id.")],
    fuse_lora: Annotated[
        list[str] | None, typer.Option(help="A LoRA to add to the model's weights first; repeatable.")
    ] = None,
    edit: Annotated[list[Path] | None, typer.Option(help="An edit to apply first; repeatable.")] = None,
    n: Annotated[int | None, typer.Option(min=2, help="Images for the distances (on Ink); 5000 by default.")] = None,
    judged: Annotated[
        int | None, typer.Option(min=1, help="Prompts judged for agreement; min(2000, n) by default.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines with "text" and one label per group, instead of Ink\'s grammar.')
    ] = None,
    detector: Annotated[str, typer.Option(help="ink, or an image classifier's folder or hub id.")] = "ink",
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; the checkpoint's own by default.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, help="1 is no guidance.")] = None,
    sampler: Annotated[str | None, typer.Option(help="As in `generate`; the model's own by default.")] = None,
    eta: Annotated[float | None, typer.Option(min=0, max=1, help="As in `generate`.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Keys the noise and the prompts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the numbers to this JSON file.")] = None,
    revision: Revision = None,
    variant: Variant = None,
    file_config: FileConfig = None,
    batch_size: BatchSize = None,
    dtype: Precision = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Draw prompts with known answers and count what a detector sees; on Ink, also FID, KID, precision and recall.

    On several processes, each of which draws its share: accelerate launch -m sublimate.cli evaluate MODEL
    """
    import json

    from sublimate.evaluation.agreement import agreement, check_judge
    from sublimate.evaluation.detectors import open_detector
    from sublimate.evaluation.drawing import drawing
    from sublimate.evaluation.hardware import hardware_line
    from sublimate.evaluation.ink_study import ink_quality
    from sublimate.evaluation.studies import read_prompt_set
    from sublimate.pipelines.cards import public_values
    from sublimate.training.together import accelerator

    if prompts is not None and (n is not None or judged is not None):
        raise ValueError("--n and --judged are for Ink's grammar: your own prompts are all drawn and judged.")
    launched = accelerator()  # chooses the process's own device, which is then "cuda"
    where = {"revision": revision, "variant": variant, "config": file_config, "device": device}
    opened = opened_as_asked(model, dtype, fuse_lora, edit, **where)
    judge = open_detector(detector, device=device)

    options = {"steps": steps, "guidance_scale": guidance_scale, "sampler": sampler, "eta": eta}
    draw = drawing(opened, progress=True, batch_size=batch_size, **options)
    if prompts is not None:
        asked = read_prompt_set(prompts)
        check_judge(opened, judge, asked.expected)
        found = agreement(judge, draw(asked.texts, seed), asked.expected)
        measured = {"agreement": found.to_dict()}
    else:
        check_judge(opened, judge)
        n = 5000 if n is None else n
        quality = ink_quality(draw, judge, n=n, judged=min(2000, n) if judged is None else judged, seed=seed)
        found, measured = quality.agreement, quality.to_dict()
        if launched.is_main_process:
            typer.echo(f"fidelity: {quality.fidelity}\nfloor (real against real): {quality.floor}")
    if launched.is_main_process:
        for name, rate in {**found.groups, "all that was asked": found.together, "rejected": found.rejected}.items():
            typer.echo(f"{name}: {rate}")
        if out is not None:
            how = {
                **options,
                "dtype": dtype,
                "detector": detector,
                "prompts": None if prompts is None else str(prompts),
                "edits": [str(path) for path in edit or ()],
                "loras": list(opened.loras),
            }
            asked_of = {"model": opened.source, "content_hash": opened.content_hash(), "seed": seed}
            record = {**asked_of, "options": public_values(how), **measured}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({**record, "hardware": hardware_line()}, indent=2) + "\n")
    # A process that leaves while the group's threads run may be aborted by them.
    launched.end_training()
