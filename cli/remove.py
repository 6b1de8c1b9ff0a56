"""Remove an object from an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from sublimate.cli.opening import (
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

SAVING_MEMORY = "take --dtype bfloat16, or a smaller image"


def command(
    model: Annotated[
        str, typer.Argument(help="A Stable Diffusion 1.x, 2.x or XL checkpoint: folder, file, hub id, ink.")
    ],
    image: Annotated[Path, typer.Argument(help="The image, of a size that the model can draw.")],
    mask: Annotated[Path, typer.Argument(help="An image of the same size: white on the object, black elsewhere.")],
    out: Annotated[Path, typer.Option(help="The PNG file to write.")] = Path("runs/removed.png"),
    fuse_lora: FuseLora = None,
    edit: Edits = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of the whole schedule.")] = 50,
    strength: Annotated[float, typer.Option(min=0, max=1, help="How far the image is noised.")] = 0.8,
    scale: Annotated[float, typer.Option(min=0, help="Of the guidance away from the object.")] = 9.0,
    dilation: Annotated[float, typer.Option(min=0, help="Widens the mask by a blur of so many pixels.")] = 0.0,
    inversion: Annotated[str, typer.Option(help="How the image becomes noise: noise or ddim.")] = "noise",
    attention: Annotated[
        str | None, typer.Option(help="Attention kernel: auto, sdpa, math, flash, efficient, cudnn, eager, xformers.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Keys the noise.")] = 0,
    revision: Revision = None,
    variant: Variant = None,
    file_config: FileConfig = None,
    dtype: Precision = "float32",
    device: Device = "auto",
) -> None:
    """Remove an object from an image and fill its place from what is around it; the model stays as it is."""
    from sublimate.pipelines.attention import set_attention
    from sublimate.pipelines.attentive_eraser import Inversion, erase_object
    from sublimate.pipelines.folders import file_written_aside
    from sublimate.pipelines.pictures import to_png
    from sublimate.training.data import read_image

    if out.suffix.lower() != ".png":
        raise ValueError(f"{out} is not the name of a PNG file: let it end in .png.")
    pictures, masks = read_image(image)[None], read_image(mask).mean(0, keepdim=True)[None]
    where = {"revision": revision, "variant": variant, "config": file_config, "device": device_as_asked(device)}
    opened = opened_as_asked(model, dtype, fuse_lora, edit, **where)
    if attention is not None:
        typer.echo(set_attention(opened, attention))
    (erased,) = erase_object(
        opened,
        pictures,
        masks,
        steps=steps,
        strength=strength,
        scale=scale,
        dilation=dilation,
        inversion=cast(Inversion, inversion),
        seed=seed,
        progress=True,
    )
    with file_written_aside(out) as aside:
        aside.write_bytes(to_png(erased))
    typer.echo(f"Wrote {out}")
