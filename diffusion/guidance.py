"""Guidance with one convention: scale 1 is none; networks are guided, or told the scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.predictions import Prediction, per_sample


def guided(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor | float,
    condition: Condition,
    null: Condition,
    scale: float | Tensor,
    *,
    features: Sequence[str] = (),
) -> Prediction:
    """The prediction with guidance: of a network that is told the scale one pass, else `extrapolated` from two.

    A network that is told the scale (guidance distillation, Meng et al. 2023, arXiv 2210.03142) knows one null
    condition, its own, whatever `null` is. Where its number is the time it jumps to, it is guided like any other.

    Args:
        denoiser: called once.
        x_t, t, condition, null, scale, features: as in `extrapolated`.

    Raises:
        ValueError: as in `extrapolated`.
    """
    if "target_time" in condition or not denoiser.reads_guidance:
        return extrapolated(denoiser, x_t, t, condition, null, scale, features=features)
    told = torch.as_tensor(scale, dtype=torch.float32, device=x_t.device).expand(len(x_t))
    return denoiser(x_t, t, condition.expand(len(x_t)).replace(guidance=told), features=features)


def extrapolated(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor | float,
    condition: Condition,
    null: Condition,
    scale: float | Tensor,
    *,
    features: Sequence[str] = (),
) -> Prediction:
    """y_null + scale (y_cond - y_null) (Ho & Salimans 2022, arXiv 2207.12598, eq. 6 with scale = 1 + w).

    The network's outputs are extrapolated; since x0, eps, v and the velocity are affine in them, so are those.

    Args:
        denoiser: called once, on a batch twice as large (on the batch itself for scale 1).
        x_t: (batch, ...).
        t: a number, () or (batch,).
        condition: of batch size 1 or batch.
        null: the text that stands for none, of batch size 1 or batch.
        scale: a number, () or (batch,). The number 1 returns the plain prediction itself.
        features: names of inner activations, returned for `condition`.

    Raises:
        ValueError: for a condition without text to replace, unless scale is the number 1.
    """
    if not isinstance(scale, Tensor) and scale == 1:
        return denoiser(x_t, t, condition, features=features)
    if condition and not null:
        raise ValueError("There is no null condition to guide by: 1 is no guidance.")
    batch = len(x_t)
    condition = condition.expand(batch)
    both = Condition.cat([condition.with_null(null), condition])
    if isinstance(t, Tensor):
        t = t.expand(batch).repeat(2)
    doubled = denoiser(torch.cat([x_t, x_t]), t, both, features=features)
    y_null, y_cond = doubled.output.chunk(2)
    weight = scale if isinstance(scale, Tensor) else torch.full((), float(scale), device=x_t.device)
    dtype = torch.promote_types(y_cond.dtype, torch.float32)
    # lerp is exact at weight 1, y_null + 1 * (y_cond - y_null) is not.
    output = torch.lerp(y_null.to(dtype), y_cond.to(dtype), per_sample(weight, y_cond).to(dtype)).to(y_cond.dtype)
    c = doubled.coefficients
    if c.alpha.ndim:
        c = type(c)(*(value[batch:] for value in c))
    taps = {name: value[batch:] for name, value in doubled.features.items()}
    return replace(doubled, x_t=x_t, output=output, coefficients=c, features=taps)
