"""Measure how well a model draws: prompt agreement, and distance to pictures, Ink's handwriting or one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sublimate.cli.judging import DetectorRevision, Labels, Threshold, detector_as_asked
from sublimate.cli.opening import (
    BatchSize,
    Device,
    Edits,
    FileConfig,
    FuseLora,
    Precision,
    Revision,
    Variant,
    device_as_asked,
    opened_as_asked,
)

if TYPE_CHECKING:
    from sublimate.pipelines.detector import Detector
    from sublimate.pipelines.model import Model

SAVING_MEMORY = "take fewer at once with --batch-size, or --dtype bfloat16"


def command(
    model: Annotated[str, typer.Argument(help="A packaged name (ink, ink_one_step), a folder, a file or a hub id.")],
    fuse_lora: FuseLora = None,
    edit: Edits = None,
    n: Annotated[
        int | None, typer.Option(min=2, help="Images for the distances: 5000 on Ink, or all that --reference has.")
    ] = None,
    judged: Annotated[
        int | None, typer.Option(min=1, help="Prompts judged for agreement; min(2000, n) by default.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines with "text" and one label per group, instead of Ink\'s grammar.')
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="ink (the default), or a classifier's or a CLIP's folder or hub id.")
    ] = None,
    labels: Labels = None,
    threshold: Threshold = None,
    detector_revision: DetectorRevision = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Folder of captioned pictures, as data.train_data_dir: draw their captions and compare."),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="With --reference: a folder or hub id (DINOv2, CLIP, ...), whose features to compare."),
    ] = None,
    image_column: Annotated[str | None, typer.Option(help='Of --reference, "image" by default.')] = None,
    caption_column: Annotated[str | None, typer.Option(help='Of --reference, "text" by default.')] = None,
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
    device: Device = "auto",
) -> None:
    """Draw prompts with known answers and count what a detector sees; on Ink, also FID, KID, precision and recall.

    With --reference, draw the captions of pictures: FID, KID, precision and recall of an encoder's features, and how
    well images fit their captions where the encoder reads texts.

    On several processes, each of which draws its share: accelerate launch -m sublimate.cli evaluate MODEL
    """
    import json

    from sublimate.evaluation.hardware import hardware_line
    from sublimate.pipelines.cards import public_values
    from sublimate.training.together import accelerator

    if (reference is None) != (encoder is None):
        raise ValueError("--reference and --encoder go together: say whose features tell pictures apart.")
    judging: dict[str, Any] = {"labels": labels, "threshold": threshold, "revision": detector_revision}
    if reference is not None and any(given is not None for given in (prompts, judged, detector, *judging.values())):
        raise ValueError(
            "--prompts, --judged, --detector and its options are about what images show: leave out --reference."
        )
    columns = {"image_column": image_column, "caption_column": caption_column}
    if reference is None and any(columns.values()):
        raise ValueError("--image-column and --caption-column are of --reference: give that too.")
    if prompts is not None and (n is not None or judged is not None):
        raise ValueError("--n and --judged are for Ink's grammar: your own prompts are all drawn and judged.")
    launched = accelerator()  # chooses the process's own device, which is then "cuda"
    where = {"revision": revision, "variant": variant, "config": file_config, "device": device_as_asked(device)}
    opened = opened_as_asked(model, dtype, fuse_lora, edit, **where)
    options = {"steps": steps, "guidance_scale": guidance_scale, "sampler": sampler, "eta": eta}
    drawn: dict[str, Any] = {"seed": seed, "batch_size": batch_size, **options}
    if reference is not None and encoder is not None:
        lines, measured = _near(opened, reference, columns, encoder, n, **drawn)
    else:
        judge = detector_as_asked(detector or "ink", **judging, device=opened.device)
        lines, measured = _obedient(opened, judge, prompts, n, judged, **drawn)
    if launched.is_main_process:
        typer.echo("\n".join(lines))
        if out is not None:
            how = {
                **options,
                "dtype": dtype,
                "detector": detector or ("ink" if reference is None else None),
                "labels": None if labels is None else str(labels),
                "threshold": threshold,
                "detector_revision": detector_revision,
                "prompts": None if prompts is None else str(prompts),
                "reference": None if reference is None else str(reference),
                "encoder": encoder,
                **columns,
                "edits": [str(path) for path in edit or ()],
                "loras": list(opened.loras),
            }
            asked_of = {"model": opened.source, "content_hash": opened.content_hash(), "seed": seed}
            record = {**asked_of, "options": public_values(how), **measured}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({**record, "hardware": hardware_line()}, indent=2) + "\n")
    # A process that leaves while the group's threads run may be aborted by them.
    launched.end_training()


def _obedient(
    model: Model,
    judge: Detector,
    prompts: Path | None,
    n: int | None,
    judged: int | None,
    *,
    seed: int,
    **options: Any,
) -> tuple[list[str], dict[str, Any]]:
    """Whether images show what was asked for, as lines and as a record."""
    from sublimate.evaluation.agreement import agreement, check_judge
    from sublimate.evaluation.drawing import drawing
    from sublimate.evaluation.ink_study import ink_quality
    from sublimate.evaluation.studies import read_prompt_set

    lines = []
    draw = drawing(model, progress=True, **options)
    if prompts is not None:
        asked = read_prompt_set(prompts)
        check_judge(model, judge, asked.expected)
        found = agreement(judge, draw(asked.texts, seed), asked.expected)
        measured = {"agreement": found.to_dict()}
    else:
        check_judge(model, judge)
        n = 5000 if n is None else n
        quality = ink_quality(draw, judge, n=n, judged=min(2000, n) if judged is None else judged, seed=seed)
        found, measured = quality.agreement, quality.to_dict()
        lines = [f"fidelity: {quality.fidelity}", f"floor (real against real): {quality.floor}"]
    rates = {**found.groups, "all that was asked": found.together, "rejected": found.rejected}
    return [*lines, *(f"{name}: {rate}" for name, rate in rates.items())], measured


def _near(
    model: Model, reference: Path, columns: dict[str, str | None], encoder: str, n: int | None, **options: Any
) -> tuple[list[str], dict[str, Any]]:
    """How near images come to pictures, as lines and as a record."""
    from sublimate.evaluation.encoders import open_encoder
    from sublimate.evaluation.reference import measure_closeness
    from sublimate.pipelines.tokens import cut_to_fit
    from sublimate.training.captioned import Images
    from sublimate.training.data_config import DataConfig
    from sublimate.training.sources import captioned_rows, framing_of
    from sublimate.training.together import everywhere

    named: dict[str, Any] = {option: column for option, column in columns.items() if column}
    if not _reads_prompts(model):
        named["caption_column"] = None
    data = DataConfig(train_data_dir=reference, center_crop=True, **named)
    try:
        pictures = Images(captioned_rows(data), framing_of(model, data))
    except ValueError as error:
        said = str(error)
        for option in columns:
            said = said.replace(f"data.{option}", "--" + option.replace("_", "-"))
        raise ValueError(said) from error
    seen_by = open_encoder(encoder, device=model.device)
    with cut_to_fit() as cut:
        found = measure_closeness(model, pictures, seen_by, n=n, progress=True, **options)
    lines = [f"fidelity: {found.fidelity}"]
    if found.floor is not None:
        lines.append(f"floor (pictures against pictures): {found.floor}")
    if found.similarity is not None:
        lines.append(f"similarity to captions: {found.similarity}; of the pictures: {found.picture_similarity}")
    were_cut = {"model": not everywhere(not cut), "encoder": not everywhere(not getattr(seen_by, "cut", False))}
    lines += [f"Captions that are longer than the {reader} reads were cut." for reader, yes in were_cut.items() if yes]
    return lines, {**found.to_dict(), "captions_cut": were_cut}


def _reads_prompts(model: Model) -> bool:
    """Whether a model is told anything; "0" is a text, and the number of a class."""
    try:
        model.encode_prompts(["0"])
    except ValueError:
        return False
    return True
