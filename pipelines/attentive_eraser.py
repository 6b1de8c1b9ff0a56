"""Attentive Eraser: an object taken out of a given image, by self-attention that looks at all but the object."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.inversion import ddim_inversion
from sublimate.diffusion.predictions import add_noise
from sublimate.diffusion.samplers import Denoise, ddim
from sublimate.pipelines.model import Model
from sublimate.pipelines.redirection import Redirection, redirected, self_attention
from sublimate.pipelines.sampling import initial_noise

Inversion = Literal["noise", "ddim"]
"""How images become noise: noise added at once (the paper's SIP), or the sampler run backwards (DIP)."""

_DILATION_THRESHOLD = 0.1


@torch.no_grad()
def erase_object(
    model: Model,
    images: Tensor,
    masks: Tensor,
    *,
    steps: int = 50,
    strength: float = 0.8,
    scale: float = 9.0,
    similarity: float = 0.3,
    suppressed: float = 9 / 50,
    first_step: float | None = None,
    first_layer: float | None = None,
    inversion: Inversion = "noise",
    dilation: float = 0.0,
    paste: bool = True,
    seed: int = 0,
    batch_size: int = 4,
    progress: bool = False,
) -> Tensor:
    """Removes an object from images and fills the place from what is around it (arXiv 2412.12974); nothing is trained.

    Images are noised, then denoised without a prompt by

        eps = eps_wo + scale (eps_w - eps_wo),

    whose second branch redirects self-attention away from the object (`pipelines/redirection.py`); after every step,
    latents outside of the mask are put back to those of the image. Complicated backgrounds may leave artefacts: the
    hole is filled with what is seen elsewhere in the image.

    Args:
        model: a Stable Diffusion 1.x, 2.x or XL checkpoint, not an inpainting one.
        images: (N, 3, height, width) in [0, 1]; a multiple of the autoencoder's factor in size, square or not.
        masks: (N, 1, height, width) or (1, 1, height, width) in [0, 1]; the object is where it is at least 0.5.
        steps: of the whole schedule, of which `strength` is run.
        strength: how far images are noised, in (0, 1].
        scale: of the guidance by redirection; 0 is plain image-to-image sampling within the mask.
        similarity: the factor of object rows' logits in the first steps; 1 suppresses nothing.
        suppressed: until when it is used, as a share of `steps`. The paper's 9 of 50.
        first_step: until when nothing is redirected, as a share of `steps`. The authors' unless given: 4 of 50, and 0
            for Stable Diffusion XL.
        first_layer: the share of self-attention layers, from the first, that stay plain. The authors' unless given: 10
            of 16, and 34 of 70.
        inversion: "noise" or "ddim". The latter is deterministic, and faithful at many steps only.
        dilation: widens masks by a blur of this standard deviation in pixels, everything above 0.1 being the object: a
            straight edge moves by 1.3 times as much. The authors' kernel of 77 on 1024 pixels is 11.9.
        paste: put the images' own pixels back outside of the masks; without, they are as the autoencoder leaves them.
        seed: keys the noise, together with each image's place.
        batch_size: images at once; changes nothing but rounding.
        progress: show a bar.

    Returns:
        (N, 3, height, width) in [0, 1], float32, on the model's device.

    Raises:
        ValueError: for a model without such self-attention, masks that are empty, leave nothing or do not fit, values
            outside of [0, 1], or an option outside of its range.
    """
    network = _network(model)
    usual_step, usual_layer = (0.0, 34 / 70) if "text_encoder_2" in model.components() else (4 / 50, 10 / 16)
    first_step = usual_step if first_step is None else first_step
    first_layer = usual_layer if first_layer is None else first_layer
    _check_options(steps, strength, scale, similarity, suppressed, first_step, first_layer, inversion)
    objects = _objects(images, masks, dilation)
    shape = model.backbone.latent_shape(model.pipeline, *images.shape[-2:])
    holes = F.adaptive_max_pool2d(objects, shape[1:])
    if bool(holes.flatten(1).all(1).any()):
        raise ValueError("A mask covers all of an image's latents: leave some background to fill the hole from.")
    images, objects = images.to(model.device, torch.float32), objects.to(model.device)
    holes = holes.to(model.device, model.dtype)
    grid = model.schedule.grid(steps, model.backbone.grid_spacing)[-(max(1, round(strength * steps)) + 1) :]
    plan = [
        (scale if i >= round(first_step * steps) else 0.0, similarity if i < round(suppressed * steps) else 1.0)
        for i in range(len(grid) - 1)
    ]
    null, found = model.null_condition().replace(**model.backbone.sizes(model.pipeline, *images.shape[-2:])), []
    around: Callable[[int], Tensor]
    with (
        redirected(network, first=first_layer) as redirection,
        tqdm(total=len(images) * len(plan), unit="step", disable=not progress) as bar,
    ):
        for first in range(0, len(images), batch_size):
            hole, x0 = holes[first : first + batch_size], model.encode(images[first : first + batch_size])
            if inversion == "ddim":
                plain = _looking_away(model, null, redirection, hole, 0.0)
                around = ddim_inversion(plain, x0, model.schedule, grid).__getitem__
            else:
                around = _noised(model, x0, initial_noise(shape, seed, range(first, first + len(x0))), grid)
            x = around(0)
            for i, (strong, flat) in enumerate(plan):
                denoise = _looking_away(model, null, redirection, hole, strong, flat)
                x = ddim(denoise, x, model.schedule, grid[i : i + 2]).to(x0.dtype)
                # Blended diffusion: outside of the hole, the image itself at the same noise.
                x = torch.where(hole > 0, x, around(i + 1))
                bar.update(len(x))
            found.append(model.render(x))
    erased = torch.cat(found)
    return torch.where(objects > 0, erased, images) if paste else erased


def dilated(masks: Tensor, width: float) -> Tensor:
    """Masks and what lies around them: where a Gaussian blur of them exceeds 0.1.

    A thin line of a mask, which a wide blur would lose, stays.

    Args:
        masks: (N, 1, height, width) of 0 and 1.
        width: standard deviation in pixels; 0 changes nothing.

    Returns:
        shaped like masks, of 0 and 1.
    """
    if width == 0:
        return masks
    reach = math.ceil(4 * width)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=masks.device) / width) ** 2)
    taps = (taps / taps.sum())[None, None, None]
    blurred = F.conv2d(F.conv2d(masks, taps, padding=(0, reach)), taps.mT, padding=(reach, 0))
    return ((masks > 0) | (blurred > _DILATION_THRESHOLD)).float()


def _looking_away(
    model: Model, null: Condition, redirection: Redirection, hole: Tensor, scale: float, similarity: float = 1.0
) -> Denoise:
    """Denoises without a prompt, guided by redirected attention; the redirection is set for this alone."""
    # Of two branches the second knows the object; a scale of 1 has that branch alone, 0 the other.
    branches = {0.0: None, 1.0: hole}
    redirection.objects = branches[scale] if scale in branches else torch.cat([torch.zeros_like(hole), hole])
    redirection.similarity = similarity
    return lambda x_t, t: guided(model.denoiser, x_t, t, null, null, scale or 1.0)


def _noised(model: Model, x0: Tensor, noise: Tensor, grid: Tensor) -> Callable[[int], Tensor]:
    """x0 at a place of the grid, with the same noise at all."""
    noise = noise.to(x0)
    return lambda i: add_noise(model.schedule, x0, noise, grid[i])


def _network(model: Model) -> Any:
    network = model.denoiser.network
    if not isinstance(network, UNet2DConditionModel) or model.backbone.shown or not self_attention(network):
        raise ValueError(
            f"{model.source} has no self-attention that can be redirected: open a Stable Diffusion 1.x, 2.x or "
            "XL checkpoint, not an inpainting one."
        )
    if model.is_student:
        raise ValueError(f"{model.source} is a student of one or few steps: open its teacher, which takes many.")
    return network


def _check_options(
    steps: int,
    strength: float,
    scale: float,
    similarity: float,
    suppressed: float,
    first_step: float,
    first_layer: float,
    inversion: str,
) -> None:
    if steps < 1 or not 0 < strength <= 1:
        raise ValueError(f"Removal needs at least 1 step and a strength in (0, 1], not {steps} and {strength}.")
    shares = {"suppressed": suppressed, "first_step": first_step, "first_layer": first_layer, "similarity": similarity}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is a share and must be in [0, 1], not {share}.")
    if not 0 <= scale < math.inf:
        raise ValueError(f"The scale of redirection cannot be {scale}: 0 is none, larger is stronger.")
    if inversion not in get_args(Inversion):
        raise ValueError(f"There is no inversion {inversion!r}; use one of {', '.join(get_args(Inversion))}.")


def _objects(images: Tensor, masks: Tensor, dilation: float) -> Tensor:
    """The masks, dilated, one per image, (N, 1, height, width) of 0 and 1."""
    if images.ndim != 4 or images.shape[1] != 3 or masks.ndim != 4 or masks.shape[1] != 1:
        raise ValueError(
            f"Give images (N, 3, height, width) and masks (N, 1, height, width), not {tuple(images.shape)} and "
            f"{tuple(masks.shape)}."
        )
    if masks.shape[2:] != images.shape[2:] or len(masks) not in (1, len(images)):
        raise ValueError(
            f"{len(masks)} masks of {tuple(masks.shape[2:])} do not fit {len(images)} images of "
            f"{tuple(images.shape[2:])}: give one per image, or one for all, of the same size."
        )
    for name, values in (("images", images), ("masks", masks)):
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"The {name} have values outside of [0, 1]: scale them, 8-bit ones by 1/255.")
    if not 0 <= dilation < math.inf:
        raise ValueError(f"The dilation of masks cannot be {dilation}: it is a number of pixels, 0 for none.")
    objects = (masks >= 0.5).float()
    if not bool(objects.flatten(1).any(1).all()):
        raise ValueError("A mask is empty: it must be at least 0.5 where the object is.")
    return dilated(objects, dilation).expand(len(images), -1, -1, -1)
