"""DITTO-2: generation steered at inference, by optimising the initial noise through a one-step student (2024)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.controls import Control
from sublimate.pipelines.generate import choose_sampling, generate_latents
from sublimate.pipelines.gradient_checkpointing import checkpointed
from sublimate.pipelines.model import Model
from sublimate.pipelines.sampling import initial_noise


@dataclass(frozen=True)
class Steered:
    """What `ditto` found.

    Attributes:
        images: (N, channels, height, width), drawn from `z` by the decoder; in [0, 1], or a sound's spectrograms.
        surrogate_images: the same of the surrogate's single step, on which the control was optimised.
        z: (N, *latent_shape), the optimised noise.
        losses: (iterations + 1, N), the control's loss before every update and after the last.
    """

    images: Tensor
    surrogate_images: Tensor
    z: Tensor
    losses: Tensor


def ditto(
    model: Model,
    prompts: Sequence[str] | int,
    control: Control,
    *,
    decoder: Model | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    eta: float | None = None,
    iterations: int = 70,
    learning_rate: float = 0.05,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    gradient_checkpointing: bool = False,
    height: int | None = None,
    width: int | None = None,
    progress: bool = False,
) -> Steered:
    """Finds noise from which a control is obeyed (arXiv 2405.20289, algorithm 1).

        z* = argmin_z control(decode(M_1(z, c))),     images = decode(M_T(z*, c))

    M_1 is one step of the student: cheap to differentiate, and close enough to the several steps M_T that follow. Adam
    moves z alone; samples do not interact, and no weight receives a gradient.

    Args:
        model: the one-step student (a few-step student's first step, or any denoiser's), the surrogate.
        prompts: one per sample, or how many an unconditional model shall draw.
        control: the loss, see `pipelines.controls`; any differentiable function of the media.
        decoder: draws the final media from z*; `model` unless given. It must share the surrogate's latent space.
        steps, sampler, eta: how the decoder samples, see `generate`; its own defaults.
        iterations: updates of z; 0 draws without steering.
        learning_rate: Adam's, in units of z's standard deviation.
        guidance_scale: of the decoder; its own default. The surrogate is not guided; one that is told a scale is told
            its own default, or this one if it is the decoder too.
        seed: keys the initial noise and the sampler's fresh noise, together with each sample's place.
        batch_size: samples optimised at once; changes nothing but rounding.
        gradient_checkpointing: recompute the surrogate's activations in the backward pass to save memory.
        height, width: of the media, see `generate`; the checkpoints' own size unless given.
        progress: show a bar.

    Raises:
        ValueError: for models of different latent spaces, or options that make no optimisation.
    """
    decoder = model if decoder is None else decoder
    shape, drawn = (m.backbone.latent_shape(m.pipeline, height, width) for m in (model, decoder))
    if drawn != shape:
        raise ValueError(
            f"The decoder draws latents of {drawn}, the surrogate of {shape}: they must share one latent space."
        )
    if iterations < 0 or learning_rate <= 0:
        raise ValueError(
            f"Steering needs 0 or more iterations and a positive step, not {iterations}, {learning_rate}."
        )
    if isinstance(prompts, str):
        raise TypeError(f"Give a list of prompts: [{prompts!r}].")
    texts = [""] * prompts if isinstance(prompts, int) else list(prompts)
    how: dict[str, Any] = {"steps": steps, "sampler": sampler, "eta": eta, "guidance_scale": guidance_scale}
    choose_sampling(decoder, **how, height=height, width=width)  # refused now rather than after all updates
    noise = initial_noise(shape, seed, range(len(texts)))
    scale = guidance_scale if decoder is model else None
    saving = checkpointed(model) if gradient_checkpointing else nullcontext()
    found, losses, surrogates = [], [], []
    with saving, tqdm(total=len(texts) * iterations, unit="update", desc="ditto", disable=not progress) as bar:
        for first in range(0, len(texts), batch_size):
            part = slice(first, first + batch_size)
            condition = _condition(model, texts[part], scale, height, width)
            z, history, media = _optimised(model, condition, control, noise[part], iterations, learning_rate, bar)
            found.append(z)
            losses.append(history)
            surrogates.append(media)
    z = torch.cat(found)
    latents = generate_latents(
        decoder,
        prompts,
        z=z,
        **how,
        seed=seed,
        batch_size=batch_size,
        height=height,
        width=width,
    )
    with torch.no_grad():
        images = torch.cat([decoder.render(part) for part in latents.split(batch_size)])
    return Steered(images, torch.cat(surrogates), z, torch.cat(losses, dim=1))


def surrogate(model: Model, z: Tensor, prompts: Sequence[str]) -> Tensor:
    """The media of one step from z ~ N(0, I), (N, *latent_shape), not clamped; differentiable in z."""
    return _media(model, z, _condition(model, prompts, None))


@torch.no_grad()
def _condition(
    model: Model, prompts: Sequence[str], scale: float | None, height: int | None = None, width: int | None = None
) -> Condition:
    """What the surrogate is told."""
    sizes = model.backbone.sizes(model.pipeline, height, width)
    condition = model.encode_prompts(prompts).replace(**sizes.expand(len(prompts)))
    # A trajectory student's number is the time to jump to, which is clean data unless it is told otherwise.
    if not model.denoiser.reads_guidance:
        return condition
    told = model.guidance_scale if scale is None else scale
    return condition.replace(guidance=torch.full((len(prompts),), float(told), device=model.device))


def _media(model: Model, z: Tensor, condition: Condition) -> Tensor:
    schedule = model.schedule
    start = float(model.defaults.get("start", schedule.t_max))
    x_t = (schedule.start_scale(start) * model.noise_scale * z).to(model.dtype)
    return model.decode(model.denoiser(x_t, start, condition).x0)


def _optimised(
    model: Model, condition: Condition, control: Control, z: Tensor, iterations: int, learning_rate: float, bar: tqdm
) -> tuple[Tensor, Tensor, Tensor]:
    """Optimised noise, losses (iterations + 1, batch) and the surrogate's last media, without gradients."""
    z = z.to(model.device).clone().requires_grad_(True)
    # Adam scales every element by its own history: samples of a batch stay apart.
    optimizer = torch.optim.Adam([z], lr=learning_rate)
    history = []
    for _ in range(iterations):
        loss = control(_media(model, z, condition))
        (z.grad,) = torch.autograd.grad(loss.sum(), [z])
        history.append(loss.detach().float())
        optimizer.step()
        bar.update(len(z))
    with torch.no_grad():
        media = _media(model, z, condition)
        history.append(control(media).float())
    return z.detach(), torch.stack(history), model.bounded(media)
