"""Images from prompts, with noise that depends on the seed and each image's place alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sublimate.diffusion import samplers
from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.predictions import Prediction
from sublimate.pipelines.model import Model

SAMPLERS = ("ddim", "euler", "heun", "one_step")
STEPS = 25


def image_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of one image, keyed by (seed, index).

    A stock pipeline given `generator=[image_generator(seed, i) for i in range(n)]` starts from the same noise.
    """
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def initial_noise(shape: Sequence[int], seed: int, indices: Sequence[int]) -> Tensor:
    """N(0, I) for some images, (len(indices), *shape) float32 on the CPU; each row depends on its own key only."""
    return torch.stack([torch.randn(tuple(shape), generator=image_generator(seed, i)) for i in indices])


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[str] | int,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    sampler: str | None = None,
    start: float | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Draws one image per prompt; the batch size changes nothing but rounding.

    Args:
        model: what draws.
        prompts: one per image, or how many images an unconditional model shall draw.
        steps: sampling steps; the checkpoint's own default, else 25.
        guidance_scale: 1 is none; the checkpoint's own default, else its family's.
        negative_prompt: what guidance leads away from, instead of no text.
        seed: keys the noise, together with each image's place in `prompts`.
        batch_size: images at once.
        sampler: "ddim", "euler", "heun" or "one_step"; the family's own unless given.
        start: the schedule's time at which pure noise is put in, for a single step; the checkpoint's own default,
            else the schedule's end.
        height, width: of the images in pixels; the checkpoint's own size unless given.
        progress: show a bar.

    Returns:
        (N, 3, height, width) float32 in [0, 1], on the model's device.

    Raises:
        ValueError: for options that do not fit each other or the model, or a prompt that is too long.
    """
    latents = generate_latents(
        model,
        prompts,
        steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        seed=seed,
        batch_size=batch_size,
        sampler=sampler,
        start=start,
        height=height,
        width=width,
        progress=progress,
    )
    return torch.cat([model.decode(part).float().clamp(0, 1) for part in latents.split(batch_size)])


@torch.no_grad()
def generate_latents(
    model: Model,
    prompts: Sequence[str] | int,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    sampler: str | None = None,
    start: float | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: bool = False,
) -> Tensor:
    """As `generate`, without decoding: x0 (N, *latent_shape) in the model's precision, on its device."""
    if isinstance(prompts, str):
        raise TypeError(f"Give a list of prompts: [{prompts!r}].")
    texts = [""] * prompts if isinstance(prompts, int) else list(prompts)
    if not texts or batch_size < 1:
        raise ValueError(f"There is nothing to draw: {len(texts)} prompts in batches of {batch_size}.")
    steps = int(model.defaults.get("steps", STEPS)) if steps is None else steps
    scale = model.guidance_scale if guidance_scale is None else float(guidance_scale)
    run = _sampler(model, model.backbone.sampler if sampler is None else sampler, steps, start)
    null = _null(model, scale, negative_prompt)
    shape = model.backbone.latent_shape(model.pipeline, height, width)
    calls = 2 * steps - 1 if sampler == "heun" else steps
    drawn = []
    with tqdm(total=len(texts) * calls, unit="pass", disable=not progress) as bar:
        for first in range(0, len(texts), batch_size):
            part = texts[first : first + batch_size]
            condition = model.encode_prompts(part)
            indices = range(first, first + len(part))
            z = initial_noise(shape, seed, indices).to(model.device, model.dtype)
            drawn.append(run(_denoise(model, condition, null, scale, bar), z))
    return torch.cat(drawn)


def _sampler(model: Model, name: str, steps: int, start: float | None) -> Callable[[samplers.Denoise, Tensor], Tensor]:
    """(denoise, z ~ N(0, I)) -> x0."""
    schedule = model.schedule
    if name not in SAMPLERS:
        raise ValueError(f"There is no sampler {name!r}; use one of {', '.join(SAMPLERS)}.")
    if steps < 1:
        raise ValueError(f"Sampling needs at least 1 step, not {steps}.")
    start = float(model.defaults.get("start", schedule.t_max)) if start is None else start
    if name == "one_step" or start != schedule.t_max:
        if steps != 1:
            raise ValueError(
                f"The one_step sampler, and any start before the schedule's end, takes 1 step, not {steps}."
            )
        return lambda denoise, z: samplers.one_step(denoise, z, schedule, start)
    walk = {"ddim": samplers.ddim, "euler": samplers.euler, "heun": samplers.heun}[name]
    grid = schedule.grid(steps, model.backbone.grid_spacing)
    return lambda denoise, z: walk(denoise, schedule.noise_scale * z, schedule, grid)


def _null(model: Model, scale: float, negative_prompt: str | None) -> Condition:
    if not scale >= 0:
        raise ValueError(f"The guidance scale cannot be {scale}: 1 is no guidance, larger is stronger.")
    if negative_prompt is not None and scale == 1:
        raise ValueError("A negative prompt needs guidance: set guidance_scale above 1.")
    if model.backbone.reads_guidance(model.denoiser.network):
        if negative_prompt is not None:
            raise ValueError(f"{model.source} is told the guidance scale and has no use for a negative prompt.")
        return Condition()
    if scale == 1:
        return Condition()
    null = model.null_condition() if negative_prompt is None else model.encode_prompts([negative_prompt])
    if not null:
        raise ValueError(f"{model.source} has no text to guide by: set guidance_scale to 1.")
    return null


def _denoise(model: Model, condition: Condition, null: Condition, scale: float, bar: tqdm) -> samplers.Denoise:
    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        bar.update(len(x_t))
        if model.backbone.reads_guidance(model.denoiser.network):
            told = condition.replace(guidance=torch.full((len(x_t),), scale, device=x_t.device))
            return model.denoiser(x_t, t, told)
        return guided(model.denoiser, x_t, t, condition, null, scale)

    return denoise
