"""Erase concepts from a model's weights; writes an edit and, if asked, the edited model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sublimate.cli.opening import FileConfig, FuseLora, Precision, Revision, Variant, device_as_asked, opened_as_asked

if TYPE_CHECKING:
    import torch

    from sublimate.erasure.eraser import Eraser
    from sublimate.erasure.request import Request
    from sublimate.pipelines.detector import Detector

SAVING_MEMORY = (
    "take --dtype bfloat16, and of a method that trains --set gradient_checkpointing=true; --dry-run counts"
)


def command(
    model: Annotated[str, typer.Argument(help="A packaged name (ink, ink_one_step), a folder, a file or a hub id.")],
    concepts: Annotated[list[str] | None, typer.Argument(help="What to erase: one name per concept.")] = None,
    request_file: Annotated[
        Path | None,
        typer.Option("--request", help="YAML with what to erase and preserve, instead of names and their options."),
    ] = None,
    method: Annotated[str, typer.Option(help="A method of `sublimate methods`.")] = "uce",
    config: Annotated[str | None, typer.Option(help="The method's options: a YAML file or packaged name.")] = None,
    option: Annotated[list[str] | None, typer.Option("--set", help="A method's option, as key=value.")] = None,
    anchor: Annotated[str, typer.Option(help="What takes the concept's place.")] = "",
    synonym: Annotated[list[str] | None, typer.Option(help="Another name of the (single) concept.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures of the (single) concept, of any size.")
    ] = None,
    preserve: Annotated[list[str] | None, typer.Option(help="A concept to protect; repeatable.")] = None,
    within: Annotated[str | None, typer.Option(help="Erase only where this is asked for.")] = None,
    detector: Annotated[
        str | None,
        typer.Option(help="Of methods that consult one: ink, or an image classifier's folder or hub id."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for edit.safetensors (and the model).")] = Path("runs/edit"),
    fold: Annotated[bool, typer.Option("--fold", help="Also write the edited model as a diffusers folder.")] = False,
    fuse_lora: FuseLora = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Also write the edit as a LoRA, for diffusers and in kohya's layout.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="All randomness derives from it.")] = 0,
    revision: Revision = None,
    variant: Variant = None,
    file_config: FileConfig = None,
    dtype: Precision = "float32",
    device: Annotated[
        str,
        typer.Option(help="Where the model is opened: auto, cpu, cuda, ...; training goes where accelerate says."),
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print request, options and their counted cost, and stop."),
    ] = False,
) -> None:
    """Erase concepts and write the edit, which applies to and comes off the base model bit by bit."""
    from sublimate.erasure.eraser import Eraser
    from sublimate.pipelines.lora_files import save_lora
    from sublimate.training import registry
    from sublimate.training.config import load_config, parse_overrides, validate_section

    said = {
        "--anchor": anchor,
        "--synonym": synonym,
        "--images": images,
        "--preserve": preserve,
        "--within": within,
    }
    request = _asked(concepts or (), request_file, {name: value for name, value in said.items() if value})
    kind = registry.load("sublimate.erasure.methods", method, Eraser)
    changes = option or ()
    if config is None:
        options = validate_section(kind.Config, parse_overrides(changes), method)
    else:
        options = load_config(kind.Config, config, changes, kind="erase")
    eraser = kind(options)
    if anchored := [concept.name for concept in request.erase if concept.anchor and not eraser.uses_anchor]:
        unread = "--anchor" if request_file is None else f"the anchor of {anchored[0]!r}"
        raise ValueError(f"{method} leads away from a concept, not to another: leave out {unread}.")
    eraser.check(request)
    if detector is not None and not eraser.uses_detector:
        raise ValueError(f"{method} does not consult a detector: leave out --detector.")
    if (fold or lora) and eraser.attaches:
        raise ValueError(
            f"{method} makes an attachment, which no diffusers folder holds: leave out --fold and --lora."
        )
    if lora and not eraser.low_rank:
        raise ValueError(f"{method} replaces weights by others of full rank, which no LoRA holds: leave out --lora.")
    if dry_run:
        _plan(eraser, file_config or model, request, revision, dtype)
        return
    place = device_as_asked(device)
    judge = _judge(detector, place)
    where = {"revision": revision, "variant": variant, "config": file_config, "device": place}
    opened = opened_as_asked(model, dtype, fuse_lora, (), **where)
    out.mkdir(parents=True, exist_ok=True)  # refused now rather than after the fit
    edit = eraser.fit(opened, request, seed=seed, detector=judge, progress=True)
    typer.echo(f"Wrote {edit.save(out / 'edit.safetensors')}")
    if fold:
        folder = edit.fold(opened, out / "model")
        typer.echo(f'Wrote {folder}: DiffusionPipeline.from_pretrained("{folder}")')
    if lora:
        state = edit.to_lora(opened)
        (out / "lora").mkdir(exist_ok=True)
        save_lora(state, out / "lora")
        typer.echo(f'Wrote {out / "lora"}: pipeline.load_lora_weights("{out / "lora"}")')


def _asked(concepts: Sequence[str], file: Path | None, said: Mapping[str, Any]) -> Request:
    """What the command line asks for: in a file, or by names and what options say of them, of those that are given.

    Raises:
        ValueError: when both or neither is there, or an option of a single concept is given for several.
    """
    from sublimate.erasure.request import Concept, Request
    from sublimate.erasure.request_files import read_request
    from sublimate.training.data import image_files

    if file is not None:
        if both := [*map(repr, concepts), *said]:
            raise ValueError(f"--request says all that is to be erased and preserved: leave out {', '.join(both)}.")
        return read_request(file)
    if not concepts:
        raise ValueError("Nothing to erase: name at least one concept, or give a file with --request.")
    for option in ("--synonym", "--images"):
        if option in said and len(concepts) > 1:
            raise ValueError(f"{option} belongs to a single concept: write several into a file, for --request.")
    pictures = image_files(said["--images"]) if "--images" in said else ()
    anchor, synonyms = said.get("--anchor", ""), tuple(said.get("--synonym", ()))
    return Request(
        erase=tuple(Concept(name, anchor, synonyms, images=pictures) for name in concepts),
        preserve=tuple(map(Concept, said.get("--preserve", ()))),
        within=Concept(said["--within"]) if "--within" in said else None,
    )


def _judge(detector: str | None, device: torch.device) -> Detector | None:
    """The detector that is asked for, where the model is."""
    if detector is None:
        return None
    from sublimate.evaluation.detectors import open_detector

    return open_detector(detector, device=device)


def _plan(eraser: Eraser, model: str, request: Request, revision: str | None, dtype: str) -> None:
    """Prints a file of the options, with what else there is to say in comments."""
    import torch

    from sublimate.erasure.eraser import NotCounted
    from sublimate.pipelines.shapes import NoShapes, open_shapes
    from sublimate.training.config import dump_config

    typer.echo(f"# {eraser.name()} of {model}: {json.dumps(request.to_dict())}")
    typer.echo(dump_config(eraser.config), nl=False)
    try:
        shapes = open_shapes(model, revision=revision, dtype=getattr(torch, dtype))
    except NoShapes as unknown:
        typer.echo(f"# operations and memory are not counted: {unknown}")
        return
    try:
        lines = eraser.plan(shapes, request).lines()
    except NotCounted as unknown:
        lines = [f"operations and memory are not counted: {unknown}"]
    for line in lines:
        typer.echo(f"# {line}")
