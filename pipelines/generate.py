"""Images and sounds from prompts, with noise that depends on the seed and each image's place alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from sublimate.diffusion import samplers
from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.schedules import Schedule
from sublimate.pipelines.discriminator_guidance import DiscriminatorGuidance
from sublimate.pipelines.few_steps import FEW_STEP_SAMPLERS, FewSteps, sample_few_steps
from sublimate.pipelines.finite import finite
from sublimate.pipelines.model import Model
from sublimate.pipelines.negative_attention import STRENGTH, as_negative, negative_attention
from sublimate.pipelines.sampling import Run, at_once, sample
from sublimate.pipelines.speedupnet import attached_speedupnet, told_guidance
from sublimate.pipelines.tokens import truncating

SAMPLERS = ("ddim", "euler", "heun", "ancestral", "one_step", *FEW_STEP_SAMPLERS)
STEPS = 25


class SamplingOptions(TypedDict, total=False):
    """How a model is sampled; what is left out, or None, is the checkpoint's own.

    Attributes:
        steps: sampling steps; the checkpoint's own default, else 25.
        guidance_scale: 1 is none; the checkpoint's own default, else its family's. An attached SpeedUpNet is told it,
            and has a default of its own.
        negative_prompt: what guidance leads away from, instead of no text; or, with a strength, negative attention.
        negative_strength: of negative attention, for networks that are called once a step; about 0.1 to 0.5, 0 is
            none.
        sampler: "ddim", "euler", "heun", "ancestral" (DDPM's, with fresh noise in every step), "one_step", or a
            few-step student's "consistency", "target_driven" or "trajectory" (see `FewSteps`); the checkpoint's own
            default, else its family's.
        eta: of "target_driven" and "trajectory": 0 is deterministic; the checkpoint's own default.
        clipped_calls: of the few-step samplers: how many of the first calls clip their x0; the checkpoint's default.
        start: the schedule's time at which pure noise is put in, for a single step; the checkpoint's own default,
            else the schedule's end.
        discriminator: corrects the score of "ddim" and "heun"; its own guidance scale is then the default.
        height, width: of images in pixels, of spectrograms in frames and bins; the checkpoint's own size unless
            given.
    """

    steps: int | None
    guidance_scale: float | None
    negative_prompt: str | None
    negative_strength: float | None
    sampler: str | None
    eta: float | None
    clipped_calls: int | None
    start: float | None
    discriminator: DiscriminatorGuidance | None
    height: int | None
    width: int | None


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[str] | int,
    *,
    seed: int = 0,
    first: int = 0,
    batch_size: int | None = None,
    shown: Condition | None = None,
    truncate_prompts: bool = False,
    device: torch.device | str | None = None,
    progress: bool = False,
    **options: Unpack[SamplingOptions],
) -> Tensor:
    """Draws one image, or one sound's spectrogram, per prompt; the batch size changes nothing but rounding.

    Args:
        model: what draws.
        prompts: one per image, or how many images an unconditional model shall draw.
        seed: keys the noise, together with each image's place in `prompts`.
        first: the place of the first prompt: a part of a longer list, drawn alone, keeps its noise.
        batch_size: images at once; by default fewer, the larger they are, and decoded in smaller parts.
        shown: what `model.show` makes of pictures, for models that see some, or other sizes than those that are drawn
            for models that are told some; of batch size 1 or one per prompt.
        truncate_prompts: cut prompts that are longer than a text encoder reads, as stock pipelines do, and say how
            many; they are refused unless it is set.
        device: where the images are wanted, such as "cpu" for more than a GPU holds; the model's unless given.
        progress: show a bar.
        options: steps, guidance, sampler and size, see `SamplingOptions`.

    Returns:
        Images (N, 3, height, width) in [0, 1], or spectrograms (N, 1, frames, bins), which `sound.waveforms` plays;
        float32.

    Raises:
        ValueError: for options that do not fit each other or the model, a prompt that is too long, or a model that
            overflows its precision.
    """
    latents = generate_latents(
        model,
        prompts,
        seed=seed,
        first=first,
        batch_size=batch_size,
        shown=shown,
        truncate_prompts=truncate_prompts,
        progress=progress,
        **options,
    )
    return rendered(model, latents, batch_size=batch_size, device=device)


@torch.no_grad()
def rendered(
    model: Model, latents: Tensor, *, batch_size: int | None = None, device: torch.device | str | None = None
) -> Tensor:
    """As `model.render`, in parts whose decoding fits beside the model, for results and not for every call.

    Args:
        model: decodes.
        latents: x0 (N, *latent_shape), N at least 1.
        batch_size: the most at once.
        device: where the media are wanted; the model's unless given.

    Returns:
        Media as they are shown, float32.

    Raises:
        ValueError: for media that are not finite.
    """
    parts = latents.split(min(batch_size or len(latents), at_once(latents.shape, cost=4)))
    decoded = (finite(model, model.decode(part), model.backbone.medium + "s") for part in parts)
    return torch.cat([model.bounded(media).to(device or model.device) for media in decoded])


@torch.no_grad()
def generate_latents(
    model: Model,
    prompts: Sequence[str] | int,
    *,
    seed: int = 0,
    first: int = 0,
    batch_size: int | None = None,
    z: Tensor | None = None,
    shown: Condition | None = None,
    truncate_prompts: bool = False,
    progress: bool = False,
    **options: Unpack[SamplingOptions],
) -> Tensor:
    """As `generate`, without decoding: x0 (N, *latent_shape) in the model's precision, on its device.

    `z`, (N, *latent_shape), replaces the initial noise of the seed; the fresh noise of a sampler stays the seed's.
    """
    if isinstance(prompts, str):
        raise TypeError(f"Give a list of prompts: [{prompts!r}].")
    texts = [""] * prompts if isinstance(prompts, int) else list(prompts)
    if not texts or (batch_size is not None and batch_size < 1):
        raise ValueError(f"There is nothing to draw: {len(texts)} prompts in batches of {batch_size}.")
    if z is not None and len(z) != len(texts):
        raise ValueError(f"{len(texts)} samples need as many initial noises, not {len(z)}.")
    with truncating(truncate_prompts):
        chosen = choose_sampling(model, **options)
        if z is not None and tuple(z.shape[1:]) != chosen.shape:
            raise ValueError(f"Initial noise of {tuple(z.shape[1:])} does not fit latents of {chosen.shape}.")
        size = options.get("height"), options.get("width")
        sizes = model.backbone.sizes(model.pipeline, *size).expand(len(texts))
        shown = sizes if shown is None else sizes.replace(**shown.expand(len(texts)))

        def told(rows: slice) -> Condition:
            condition = model.encode_prompts(texts[rows])
            return condition.replace(**shown.index(rows), **chosen.negative.expand(len(texts[rows])))

        with nullcontext() if options.get("negative_strength") is None else negative_attention(model.denoiser.network):
            drawn = sample(
                model,
                told,
                chosen.run,
                len(texts),
                null=chosen.null,
                scale=chosen.scale,
                reads_target=chosen.reads_target,
                seed=seed,
                first=first,
                z=z,
                shape=chosen.shape,
                batch_size=batch_size,
                calls=chosen.calls,
                progress=progress,
            )
    return finite(model, drawn, "latents")


@dataclass(frozen=True)
class Sampling:
    """How a model is sampled, once defaults are filled in.

    Attributes:
        run: the sampler's walk over one batch.
        shape: of one sample's latents.
        null, scale: guidance: away from `null` by `scale`.
        negative: what the network is told besides.
        reads_target: whether the network is told where a jump ends.
        calls: network calls per sample.
    """

    run: Run
    shape: tuple[int, int, int]
    null: Condition
    scale: float
    negative: Condition
    reads_target: bool
    calls: int


@torch.no_grad()
def choose_sampling(
    model: Model,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    negative_strength: float | None = None,
    sampler: str | None = None,
    eta: float | None = None,
    clipped_calls: int | None = None,
    start: float | None = None,
    discriminator: DiscriminatorGuidance | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Sampling:
    """What `generate` does with these options (see `SamplingOptions`), once the checkpoint's defaults are filled in.

    Raises:
        ValueError: for options that do not fit each other or the model.
    """
    if not isinstance(negative_prompt, str | None):
        raise TypeError(f"Give one negative prompt, a text, which serves all prompts, not {negative_prompt!r}.")
    few = _few_steps(model, sampler, steps, start, eta=eta, clipped_calls=clipped_calls)
    adapter = attached_speedupnet(model.denoiser.network)
    defaults = {"guidance_scale": model.guidance_scale, **model.defaults, **(adapter or {})}
    if steps is None:
        steps = few.steps if few else 1 if sampler == "one_step" else int(defaults.get("steps", STEPS))
    if steps < 1:
        raise ValueError(f"Sampling needs at least 1 step, not {steps}.")
    default = defaults["guidance_scale"] if discriminator is None else discriminator.guidance_scale
    scale = float(default) if guidance_scale is None else float(guidance_scale)
    name = sampler or defaults.get("sampler", model.backbone.sampler)
    if discriminator is not None and (few or name not in ("ddim", "heun")):
        raise ValueError(f"A discriminator corrects the samplers ddim and heun, not {few.sampler if few else name}.")
    if discriminator is not None and start is not None:
        raise ValueError("A discriminator corrects whole trajectories: leave out start.")
    shape = model.backbone.latent_shape(model.pipeline, height, width)
    schedule = model.schedule_at(shape)
    run = _few_step_run(schedule, few) if few else _walk(model, schedule, name, steps, start)
    if discriminator is not None:
        run = _corrected(discriminator, schedule.grid(steps, model.backbone.grid_spacing), name)
    reads_target = few is not None and few.sampler == "trajectory"
    reads_guidance = not reads_target and model.denoiser.reads_guidance
    if negative_strength is not None:
        null, negative = Condition(), _negative(model, scale, negative_prompt, negative_strength)
    elif adapter is not None:
        null, negative, scale = Condition(), told_guidance(model, scale, negative_prompt), 1.0
    else:
        null, negative = _null(model, scale, negative_prompt, reads_guidance), Condition()
    calls = 2 * steps - 1 if name == "heun" and few is None else steps
    return Sampling(run, shape, null, scale, negative, reads_target, calls)


def _few_steps(
    model: Model, sampler: str | None, steps: int | None, start: float | None, **options: Any
) -> FewSteps | None:
    """The few-step sampling that is asked for; None for every other sampler.

    The checkpoint's own sampling is the default, and what is given replaces it; its times belong to its own number of
    steps.
    """
    recorded = model.defaults.get("few_steps")
    given = {name: value for name, value in options.items() if value is not None}
    if sampler not in FEW_STEP_SAMPLERS and (sampler is not None or recorded is None):
        if given:
            raise ValueError(f"{', '.join(given)} belongs to the samplers {', '.join(FEW_STEP_SAMPLERS)}: choose one.")
        return None
    few = FewSteps("consistency") if recorded is None else FewSteps.from_dict(recorded)
    if sampler is not None:
        given["sampler"] = sampler
    if steps is not None and steps != few.steps:
        given |= {"steps": steps, "times": None}
    if start is not None and start != few.call_times(model.schedule)[0]:
        if (steps or few.steps) != 1:
            raise ValueError(f"A start of its own takes 1 step, not {steps or few.steps}: leave out start or steps.")
        given["times"] = (float(start),)
    few = replace(few, **given)
    if few.sampler == "consistency" and "eta" in given:
        raise ValueError("The consistency sampler adds fresh noise at every step: leave out eta.")
    return few


def _few_step_run(schedule: Schedule, few: FewSteps) -> Run:
    return lambda part: sample_few_steps(few, part.denoise, part.z, schedule, part.noise)


def _walk(model: Model, schedule: Schedule, name: str, steps: int, start: float | None) -> Run:
    """The samplers of the probability-flow ODE, and of one step."""
    if name not in SAMPLERS:
        raise ValueError(f"There is no sampler {name!r}; use one of {', '.join(SAMPLERS)}.")
    start = float(model.defaults.get("start", schedule.t_max)) if start is None else start
    if name == "one_step" or start != schedule.t_max:
        if steps != 1:
            raise ValueError(
                f"The one_step sampler, and any start before the schedule's end, takes 1 step, not {steps}."
            )
        return lambda part: samplers.one_step(part.plain, part.z, schedule, start)
    grid = schedule.grid(steps, model.backbone.grid_spacing)
    if name == "ancestral":
        return lambda part: samplers.ddim(
            part.plain, schedule.noise_scale * part.z, schedule, grid, eta=1.0, noise=part.noise
        )
    walk = {"ddim": samplers.ddim, "euler": samplers.euler, "heun": samplers.heun}[name]
    return lambda part: walk(part.plain, schedule.noise_scale * part.z, schedule, grid)


def _corrected(discriminator: DiscriminatorGuidance, grid: Tensor, name: str) -> Run:
    return lambda part: discriminator.sample(part.plain, part.z, part.condition, grid, part.noise, sampler=name)


def _null(model: Model, scale: float, negative_prompt: str | None, reads_guidance: bool) -> Condition:
    if not scale >= 1:
        raise ValueError(
            f"The guidance scale cannot be {scale}: 1 is no guidance here, where stock pipelines also write 0, and "
            "larger is stronger."
        )
    if negative_prompt is not None and scale == 1:
        raise ValueError("A negative prompt needs guidance: set guidance_scale above 1.")
    if reads_guidance:
        if negative_prompt is not None:
            raise ValueError(
                f"{model.source} is told the guidance scale and has no other use for a negative prompt than negative "
                "attention: give negative_strength."
            )
        return Condition()
    if scale == 1:
        return Condition()
    null = model.null_condition() if negative_prompt is None else model.encode_prompts([negative_prompt])
    if not null:
        raise ValueError(f"{model.source} has no text to guide by: set guidance_scale to 1.")
    return null


def _negative(model: Model, scale: float, prompt: str | None, strength: float) -> Condition:
    """What negative attention is told, of batch size 1."""
    if prompt is None:
        raise ValueError("negative_strength is of a negative prompt: give one, or leave it out.")
    if scale != 1 and not model.denoiser.reads_guidance:
        raise ValueError(f"Negative attention stands in for guidance: set guidance_scale to 1, not {scale}.")
    if not 0 <= strength < float("inf"):
        raise ValueError(f"The strength of a negative prompt cannot be {strength}: 0 is none, larger is stronger.")
    if strength == 0:
        return Condition()  # the plain network, at its own cost
    negative = as_negative(model.encode_prompts([prompt]))
    return negative.replace(**{STRENGTH: torch.full((1,), float(strength), device=model.device)})
