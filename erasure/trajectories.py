"""Where the noised samples x_t come from that an eraser trains on."""

from __future__ import annotations

import torch
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.predictions import Prediction, add_noise
from sublimate.diffusion.samplers import ddim
from sublimate.diffusion.schedules import Schedule


@torch.no_grad()
def rollout(
    denoiser: Denoiser,
    z: Tensor,
    condition: Condition,
    null: Condition,
    stops: Tensor,
    grid: Tensor,
    *,
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:
    """x_t of guided DDIM sampling, at each sample's own steps: ESD's source of x_t, which stops at one.

    The time returned is that of the noise x_t really has. (ESD's first code draws the time it tells the network from
    the interval around it.)

    Args:
        denoiser: the student being trained (ESD's paper) or the frozen network (its rewrite).
        z: N(0, I), (batch, ...).
        condition: what is drawn, of batch size 1 or batch.
        null: of batch size 1.
        stops: finished steps per sample, (batch,) or (stops, batch) integers in [0, steps); 0 is pure noise.
        grid: the times of the whole sampling, (steps + 1,), spaced as the model's images are drawn.
        guidance_scale: 1 is no guidance.

    Returns:
        x_t, (batch, ...) or (stops, batch, ...), and t, float64, shaped like `stops`.

    Raises:
        ValueError: for a stop outside the sampling.
    """
    if int(stops.min()) < 0 or int(stops.max()) >= len(grid) - 1:
        raise ValueError(f"Stops must be in [0, {len(grid) - 1}), got {stops.tolist()}.")
    schedule, condition = denoiser.schedule, condition.expand(len(z))
    x, t = at_start(schedule, z, float(grid[0]))
    own = stops.cpu().reshape(-1, len(z))
    found = x.expand(len(own), *x.shape).clone()
    for i in range(int(stops.max())):
        active = (own > i).any(0).nonzero().squeeze(1).to(x.device)
        told = condition.index(active)

        def denoise(x_t: Tensor, t: Tensor, told: Condition = told) -> Prediction:
            return guided(denoiser, x_t, t, told, null, guidance_scale)

        x[active] = ddim(denoise, x[active], schedule, grid[i : i + 2]).to(x.dtype)
        places, arrived = (own == i + 1).nonzero(as_tuple=True)
        found[places, arrived] = x[arrived]
    return found.reshape(*stops.shape, *x.shape[1:]), grid.to(t.device)[stops.to(t.device)]


def noised(schedule: Schedule, x0: Tensor, eps: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = alpha x0 + sigma eps of real or generated images, at times uniform in u.

    Args:
        schedule: what the times mean.
        x0: clean latents, (batch, ...).
        eps: N(0, I), like x0.
        u: uniform in [0, 1), (batch,).

    Returns:
        x_t (batch, ...) and t (batch,) float64.
    """
    t = schedule.uniform_time(u)
    return add_noise(schedule, x0, eps, t), t


def at_start(schedule: Schedule, z: Tensor, t: float | None = None) -> tuple[Tensor, Tensor]:
    """A one-step student's only input, its own z at its own time.

    Args:
        schedule: scales z.
        z: N(0, I), (batch, ...).
        t: the time the student is called at; t_max unless given.

    Returns:
        x_t (batch, ...) and t (batch,) float64.
    """
    t = schedule.t_max if t is None else t
    return schedule.start_scale(t) * z, torch.full((len(z),), t, dtype=torch.float64, device=z.device)
