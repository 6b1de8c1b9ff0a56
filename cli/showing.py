"""Pictures that inpainting and upscaling models are shown, and the size that is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from sublimate.diffusion.conditions import Condition
    from sublimate.pipelines.model import Model

Size = tuple[int | None, int | None]
"""(height, width) in pixels; the checkpoint's own where it is None."""


def shown_as_asked(
    model: Model,
    images: Sequence[Path],
    masks: Sequence[Path],
    size: Size,
    *,
    prompts: int,
    count: int = 1,
    seed: int = 0,
) -> tuple[Condition | None, Size]:
    """What a command was told to show a model, and the size in which the model then draws.

    Pictures are shrunk or enlarged until they cover the size, and cropped to their middle. A model that enlarges them
    is shown them in their own size where none is given.

    Args:
        model: what draws.
        images: one picture for all prompts, or one per prompt.
        masks: of inpainting, likewise: white where to paint.
        size: what was asked for.
        prompts: how many.
        count: images per prompt.
        seed: keys the noise on pictures that are enlarged.

    Raises:
        ValueError: for pictures that cannot be read, do not fit each other, or are too few, too many or not for this
            model.
    """
    kind = model.backbone.shown
    if not kind and (images or masks):
        raise ValueError(f"{model.source} is shown no pictures: leave out --image and --mask.")
    if kind == "low_res" and (masks or not images):
        raise ValueError(f"{model.source} enlarges pictures: give --image, and no --mask.")
    if kind == "masks" and bool(images) != bool(masks):
        raise ValueError("--image and --mask go together: the mask is white where the image is to be painted.")
    for name, given in (("--image", images), ("--mask", masks)):
        if len(given) not in (0, 1, prompts):
            raise ValueError(f"{name} is given once, or once per prompt ({prompts}), not {len(given)} times.")
    if not images:
        return _everything(model, size) if kind and size != (None, None) else None, size
    if kind == "masks":
        shown = _painted(model, images, masks, size)
        if shown.batch_size == 1:
            return shown, size
        return shown.index([place for place in range(prompts) for _ in range(count)]), size
    return _enlarged(model, images, size, prompts, count, seed)


def _painted(model: Model, images: Sequence[Path], masks: Sequence[Path], size: Size) -> Condition:
    """Pictures and what to paint in them, one after the other."""
    import torch

    from sublimate.diffusion.conditions import Condition
    from sublimate.training.captioned import decoded

    height, width = _pixels(model, size)
    shown = []
    for place in range(max(len(images), len(masks))):
        image, mask = images[place % len(images)], masks[place % len(masks)]
        picture, where = decoded(image, str(image)), decoded(mask, str(mask))
        if picture.size != where.size:
            raise ValueError(f"{mask} measures {where.width}x{where.height} pixels, and {image} another size.")
        white = _framed(where, height, width).mean(1, keepdim=True)
        with torch.no_grad():
            shown.append(model.show(images=_framed(picture, height, width), masks=white))
    return Condition.cat(shown)


def _everything(model: Model, size: Size) -> Condition:
    """What prompts alone ask for, in a size of one's own: all of a grey picture is to be painted."""
    import torch

    grey = torch.full((1, 3, *_pixels(model, size)), 0.5)
    with torch.no_grad():
        return model.show(images=grey, masks=torch.ones_like(grey[:, :1]))


def _enlarged(
    model: Model, images: Sequence[Path], size: Size, prompts: int, count: int, seed: int
) -> tuple[Condition, Size]:
    """Small pictures, each with noise of its own, and the size that they become."""
    import torch

    from sublimate.training.captioned import decoded
    from sublimate.training.randomness import key

    pictures, factor = [decoded(path, str(path)) for path in images], model.pipeline.vae_scale_factor
    own = pictures[0].height * factor, pictures[0].width * factor
    if size == (None, None) and len({picture.size for picture in pictures}) > 1:
        raise ValueError("The pictures differ in size: give --height and --width, of what they become.")
    becomes = size[0] or own[0], size[1] or own[1]
    _, *small = model.backbone.latent_shape(model.pipeline, *becomes)
    low_res = torch.cat([_framed(picture, *small) for picture in pictures])
    if len(low_res) > 1:
        low_res = low_res.repeat_interleave(count, 0)
    drawn = prompts * count
    generators = [torch.Generator().manual_seed(key(seed, "low_res", place)) for place in range(drawn)]
    noise = torch.stack([torch.randn(low_res.shape[1:], generator=generator) for generator in generators])
    return model.show(low_res=low_res.expand(drawn, -1, -1, -1), noise=noise), becomes


def _framed(picture: Image, height: int, width: int) -> Tensor:
    """(1, 3, height, width) in [0, 1]."""
    from sublimate.training.captioned import Framing

    return Framing(height, width, center_crop=True)(picture, 0)[None]


def _pixels(model: Model, size: Size) -> tuple[int, int]:
    """The size with the checkpoint's own in place of what is None."""
    from sublimate.training.data_config import DataConfig
    from sublimate.training.sources import framing_of

    model.backbone.latent_shape(model.pipeline, *size)  # refused here, if at all
    own = framing_of(model, DataConfig())
    return size[0] or own.height, size[1] or own.width
