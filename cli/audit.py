"""Attack an erasure: what is gone, what went with it, and what brings the concept back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sublimate.cli.judging import DetectorRevision, Labels, Threshold, detector_as_asked
from sublimate.cli.opening import Device, FileConfig, Revision, Variant, device_as_asked

N = 240
"""So many prompts per role that also those which ask for more than the concept can be certain to meet their bar."""

SAVING_MEMORY = "take --gradient-checkpointing, or --dtype bfloat16 (which skips attacks that follow gradients)"


def command(
    base: Annotated[
        str, typer.Argument(help="The model before: a packaged name (ink), a folder, a file or a hub id.")
    ],
    edited: Annotated[
        str, typer.Argument(help="The model after: an edit of BASE (.safetensors), a folder, a hub id.")
    ],
    concept: Annotated[str, typer.Option(help="What was erased, as prompts call it.")],
    synonym: Annotated[list[str] | None, typer.Option(help="Another of its names; repeatable.")] = None,
    anchor: Annotated[str | None, typer.Option(help="What neutral prompts say in its place.")] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="An attack of `sublimate methods`; repeatable. By default all but distillation."),
    ] = None,
    option: Annotated[list[str] | None, typer.Option("--set", help="An attack's option, as attack.key=value.")] = None,
    n: Annotated[int | None, typer.Option(min=1, help=f"Prompts per role, on Ink; {N} unless given.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures of the concept that attackers have.")] = 32,
    detector: Annotated[str, typer.Option(help="ink, or a classifier's or a CLIP's folder or hub id.")] = "ink",
    labels: Labels = None,
    threshold: Threshold = None,
    detector_revision: DetectorRevision = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Folder with target.jsonl (synonyms, siblings, unrelated), instead of Ink's grammar."),
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="The detector's group of the concept, with --prompts; --labels are called so.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="The detector's label, where it is not the concept.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="All randomness derives from it.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for report.html and report.json, and for finished parts to go on after.")
    ] = Path("runs/audit"),
    revision: Revision = None,
    variant: Variant = None,
    file_config: FileConfig = None,
    edited_revision: Annotated[str | None, typer.Option(help="As --revision, of an EDITED that is no edit.")] = None,
    edited_variant: Annotated[str | None, typer.Option(help="As --variant, of an EDITED that is no edit.")] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Recompute activations of what draws, to save memory."),
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Precision of both models; attacks that follow gradients are skipped in any but float32."),
    ] = "float32",
    device: Device = "auto",
) -> None:
    """Measure an erasure, then try to undo it; the report says what was tried, with which budget, and what was not."""
    import shlex
    import sys
    from dataclasses import replace

    import torch
    from tqdm.auto import tqdm

    from sublimate.erasure.request import Concept
    from sublimate.evaluation.agreement import check_judge
    from sublimate.evaluation.audit import ATTACKS, audit, make_attacks
    from sublimate.evaluation.audit_report import attack_table, audit_report
    from sublimate.evaluation.ink_demo import ink_request
    from sublimate.evaluation.ink_study import ink_study
    from sublimate.evaluation.studies import read_study
    from sublimate.pipelines.edit import Edit, beside
    from sublimate.pipelines.model import open_model
    from sublimate.training import registry
    from sublimate.training.config import parse_overrides

    if (prompts is None) != (group is None):
        raise ValueError("--prompts and --group go together: name the detector's group that your prompts are about.")
    if prompts is None and label is not None:
        raise ValueError("--label belongs to --prompts: Ink's detector knows its concepts by name.")
    if prompts is not None and n is not None:
        raise ValueError("--n is for Ink's grammar: your own prompts are all asked.")
    whole = Path(edited).suffix != ".safetensors"
    if not whole and (edited_revision or edited_variant):
        raise ValueError(f"{edited} is an edit of {base}: it has no revision and no variant of its own.")
    names = attack or [name for name in registry.available(ATTACKS) if name != "distillation"]
    attacks = make_attacks(names, parse_overrides(option or ()))
    place = device_as_asked(device)
    judge = detector_as_asked(detector, labels, threshold, detector_revision, group=group, device=place)
    if prompts is None or group is None:
        study, asked = ink_study(concept, n=n or N, seed=seed), ink_request(concept).erase[0]
    else:
        study, asked = read_study(prompts, concept, group, label), Concept(concept)
    study = replace(study, seeds=(seed,))
    for bar, (images, least) in study.too_few().items():
        typer.echo(f"{bar}: {images} images cannot be certain to meet their bar; it takes {least} or more.")
    words = tuple(dict.fromkeys((*asked.synonyms, *(synonym or ()))))
    asked = Concept(asked.name, asked.anchor if anchor is None else anchor, words)
    precision = getattr(torch, dtype)
    # Edits belong to the checkpoint in float32, and both models take their precision after.
    placed: dict[str, Any] = {"dtype": precision if whole else torch.float32, "device": place}
    before = open_model(base, revision=revision, variant=variant, config=file_config, **placed)
    check_judge(before, judge)
    if whole:
        after = open_model(edited, revision=edited_revision, variant=edited_variant, **placed)
    else:
        after = beside(before, Edit.load(edited))
    hashes = {"base hash": before.content_hash(), "edited hash": after.content_hash()}
    for model in (before, after):
        model.to(dtype=precision)

    with tqdm(desc="auditing", unit="part") as bar:

        def show(done: int, total: int, what: str) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(what)

        try:
            found = audit(
                before,
                after,
                asked,
                study,
                judge,
                attacks,
                pictures=pictures,
                seed=seed,
                gradient_checkpointing=gradient_checkpointing,
                progress=show,
                folder=out / "parts",
            )
        except KeyboardInterrupt as stop:
            stop.add_note(f"What is finished is in {out / 'parts'}: the same command goes on after it.")
            raise
    for row in attack_table(found).rows:
        typer.echo(f"{row[0]}: base {row[2]}, edited {row[3]}")
    for name in names:
        if name in found.skipped:
            typer.echo(f"{name}: not tried, {found.skipped[name]}")
    report = audit_report(
        found,
        command=shlex.join(["sublimate", *sys.argv[1:]]),
        lead=f"{edited} against {base}.",
        provenance={
            "base": before.source,
            "edited": edited,
            **hashes,
            "precision": dtype,
            "detector": detector,
            **({} if labels is None else {"detector's labels": str(labels)}),
            **({} if threshold is None else {"detector's threshold": f"{threshold:g}"}),
            **({} if detector_revision is None else {"detector's revision": detector_revision}),
        },
    )
    typer.echo(f"{found.verdict}\nWrote {report.write(out)}")
