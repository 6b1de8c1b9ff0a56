"""Draw images or sounds from a model, with or without edits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
from sublimate.cli.showing import shown_as_asked

SAVING_MEMORY = "take fewer at once with --batch-size, --dtype bfloat16, or a smaller --height and --width"


def command(
    model: Annotated[str, typer.Argument(help="A packaged name (ink, ink_one_step), a folder, a file or a hub id.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="One image per prompt; none if unconditional.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("runs/images"),
    fuse_lora: FuseLora = None,
    edit: Edits = None,
    count: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; the checkpoint's own by default.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, help="1 is no guidance.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    negative_strength: Annotated[
        float | None, typer.Option(min=0, help="Steer away inside attention instead, without guidance.")
    ] = None,
    truncate_prompts: Annotated[
        bool, typer.Option("--truncate-prompts", help="Cut prompts that are longer than the text encoder reads.")
    ] = False,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="ddim, euler, heun, ancestral, one_step, consistency, target_driven, trajectory; the model's own."
        ),
    ] = None,
    eta: Annotated[
        float | None, typer.Option(min=0, max=1, help="Noise of the few-step samplers but consistency; 0 is none.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=1, help="In pixels (of sounds: frames); the checkpoint's own by default.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="In pixels (of sounds: bins); the checkpoint's own by default.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="What inpainting or upscaling models are shown: a picture of any size, or (repeated) one per prompt."
        ),
    ] = None,
    mask: Annotated[
        list[Path] | None, typer.Option(help="Of inpainting: a picture as large as --image, white where to paint.")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="Attention kernel: auto, sdpa, math, flash, efficient, cudnn, eager, xformers.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Keys the noise.")] = 0,
    revision: Revision = None,
    variant: Variant = None,
    file_config: FileConfig = None,
    batch_size: BatchSize = None,
    dtype: Precision = "float32",
    device: Device = "auto",
) -> None:
    """Draw images and write them as PNG files, with a sheet of all of them; sounds as WAV files too."""
    from sublimate.pipelines.attention import set_attention
    from sublimate.pipelines.generate import generate
    from sublimate.pipelines.pictures import image_grid, pictures_of, to_png
    from sublimate.pipelines.sound import to_wav, waveforms

    where = {"revision": revision, "variant": variant, "config": file_config, "device": device_as_asked(device)}
    opened = opened_as_asked(model, dtype, fuse_lora, edit, **where)
    if attention is not None:
        typer.echo(set_attention(opened, attention))
    texts = [prompt for prompt in prompts or () for _ in range(count)]
    shown, (height, width) = shown_as_asked(
        opened, image or (), mask or (), (height, width), prompts=len(prompts or ()) or 1, count=count, seed=seed
    )
    media = generate(
        opened,
        texts or count,
        steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        negative_strength=negative_strength,
        sampler=sampler,
        eta=eta,
        shown=shown,
        height=height,
        width=width,
        truncate_prompts=truncate_prompts,
        seed=seed,
        batch_size=batch_size,
        progress=True,
    )
    out.mkdir(parents=True, exist_ok=True)
    images = pictures_of(media, opened.backbone.medium).cpu()
    for index, picture in enumerate(images):
        (out / f"{index:05d}.png").write_bytes(to_png(picture))
    (out / "sheet.png").write_bytes(to_png(image_grid(images)))
    if opened.backbone.medium == "audio":
        for index, spectrogram in enumerate(media.split(1)):
            (waveform,), rate = waveforms(opened, spectrogram)
            (out / f"{index:05d}.wav").write_bytes(to_wav(waveform, rate))
        typer.echo(f"Wrote {len(images)} sounds, their spectrograms and a sheet to {out}")
        return
    typer.echo(f"Wrote {len(images)} images and a sheet to {out}")
