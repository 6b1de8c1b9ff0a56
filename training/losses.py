"""Pieces that several objectives share: pseudo-targets, denoising, adversarial and f-divergence terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sublimate.diffusion.predictions import Prediction, per_sample

Divergence = Literal[
    "reverse_kl",
    "forward_kl",
    "jensen_shannon",
    "softened_reverse_kl",
    "squared_hellinger",
    "jeffreys",
    "neyman",
    "pearson",
]

# h(r) = f''(r) r^2 for r = p/q (teacher over student), f as in f-distill (arXiv 2502.15681, Table 1).
# Constants matter only beside other terms: after normalisation to mean one they drop out. That of
# Jensen-Shannon belongs to f = r log r - (r+1) log((r+1)/2), which is twice the Jensen-Shannon divergence.
F_DIVERGENCES: Mapping[Divergence, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "reverse_kl": torch.ones_like,
        "forward_kl": lambda r: r,
        "jensen_shannon": lambda r: r / (1 + r),
        "softened_reverse_kl": lambda r: 1 / (1 + r),
        "squared_hellinger": lambda r: r.sqrt() / 4,
        "jeffreys": lambda r: 1 + r,
        "neyman": lambda r: 2 / r,
        "pearson": lambda r: 2 * r.square(),
    }
)


def pseudo_target_loss(x0: Tensor, direction: Tensor) -> Tensor:
    """0.5 |x0 - sg[x0 - d]|^2 per sample as a mean over elements, whose gradient in x0 is d over the elements' number.

    With d = h(r) (mu_q - mu_p), averaging over samples gives the gradient of E_t[(sigma^2/alpha^2) D_f(p_t || q_t)],
    because the difference of scores is (alpha/sigma^2)(mu_p - mu_q). The gradient is written out: x0 - (x0 - d) would
    lose d's digits where x0 is large, as it is for an eps-network near pure noise.

    Args:
        x0: the student's samples, (batch, ...).
        direction: d, shaped like x0; no gradient flows into it.

    Returns:
        float32 (batch,).
    """
    x0, direction = x0.float(), direction.detach().float()
    moved = direction * (x0 - x0.detach())
    return (0.5 * direction.square() + moved).flatten(1).mean(1)


def density_ratio(logits: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """r = p/q as a discriminator sees it, without gradients.

    Args:
        logits: (batch, heads), estimates of log r; their mean is used, within [-10, 10].
        bounds: clamp of r; None leaves it free.

    Returns:
        (batch,), float32 or the logits' precision if that is higher.
    """
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    ratio = logits.mean(1).clamp(-10, 10).exp()
    return ratio if bounds is None else ratio.clamp(*bounds)


def f_weight_terms(divergence: Divergence, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h(r), r h'(r) and r^2 h''(r) of one of `F_DIVERGENCES`.

    Args:
        divergence: its name.
        ratio: r, positive, any shape; no gradient flows into it.
    """
    with torch.enable_grad():
        r = ratio.detach().requires_grad_(True)
        # Where h is constant or linear its derivatives do not depend on r: the zeros keep them differentiable.
        h = F_DIVERGENCES[divergence](r) + 0 * r
        (first,) = torch.autograd.grad(h.sum(), r, create_graph=True)
        (second,) = torch.autograd.grad((first + 0 * r).sum(), r)
    return h.detach(), (r * first).detach(), r.detach().square() * second


def identity_terms(x0: Tensor, p: Prediction, q: Prediction) -> tuple[Tensor, Tensor]:
    """(mu_p - mu_q)^T (mu_p - x0) and |mu_p - mu_q|^2 per sample, what score identities are made of.

    Zhou et al. 2024, arXiv 2404.04057, eq. 23. Gradients flow through x0 and, from x_t, through both predictions.

    Args:
        x0: the student's samples, (batch, ...).
        p, q: predictions of the (guided) teacher and of the critic at the noised samples.

    Returns:
        two tensors (batch,), float32 or x0's precision if that is higher.
    """
    wide = torch.promote_types(x0.dtype, torch.float32)
    mu_p, mu_q = p.x0.to(wide), q.x0.to(wide)
    difference = mu_p - mu_q
    return (difference * (mu_p - x0.to(wide))).flatten(1).sum(1), difference.square().flatten(1).sum(1)


def score_difference(x0: Tensor, p: Prediction, q: Prediction, *, normalized: bool) -> Tensor:
    """mu_q - mu_p, the direction in which reverse KL moves x0 (up to sigma^2/alpha^2, see `pseudo_target_loss`).

    Args:
        x0: the student's samples, (batch, ...).
        p, q: predictions of the (guided) teacher and of the critic at the noised samples.
        normalized: divide each sample's by its `distance_to_teacher`.

    Returns:
        float32, shaped like x0.
    """
    difference = (q.x0 - p.x0).float()
    if not normalized:
        return difference
    return difference / per_sample(distance_to_teacher(x0, p), x0)


def distance_to_teacher(x0: Tensor, p: Prediction) -> Tensor:
    """mean|x0 - mu_p| per sample without gradients, by which losses are divided so that noise levels weigh alike.

    DMD's weight (Yin et al. 2024, arXiv 2311.18828, eq. 8), and SiD's.

    Args:
        x0: the student's samples, (batch, ...).
        p: the (guided) teacher's prediction at the noised samples.

    Returns:
        float32 (batch,), at least 1e-6.
    """
    return (x0 - p.x0).detach().float().abs().flatten(1).mean(1).clamp_min(1e-6)


def denoising_loss(prediction: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """|y - y*|^2 per sample as a mean over elements, y* the network's own target (eps, v, flow, F).

    Args:
        prediction: the network's, at x_t = alpha_t x0 + sigma_t eps.
        x0, eps: (batch, ...), what x_t was made of.

    Returns:
        float32 (batch,).
    """
    target = prediction.parametrization.target(x0, eps, prediction.coefficients)
    return (prediction.output.float() - target.float()).square().flatten(1).mean(1)


def squared_loss(x: Tensor, target: Tensor) -> Tensor:
    """(x - target)^2 per sample as a mean over elements; both (batch, ...), float32 (batch,)."""
    return (x.float() - target.float()).square().flatten(1).mean(1)


def pseudo_huber_loss(x: Tensor, target: Tensor, c: float) -> Tensor:
    """sqrt((x - target)^2 + c^2) - c per sample as a mean over elements.

    Squared / 2c where the difference is far below c, absolute far above.

    Args:
        x, target: (batch, ...).
        c: > 0, in units of x.

    Returns:
        float32 (batch,).
    """
    difference = (x.float() - target.float()).square()
    # sqrt(d + c^2) - c without the difference of nearly equal numbers.
    return (difference / ((difference + c * c).sqrt() + c)).flatten(1).mean(1)


def pseudo_huber_norm(x: Tensor, target: Tensor, c: float) -> Tensor:
    """sqrt(|x - target|^2 + c^2) - c per sample, with the norm over all its elements (iCT, arXiv 2310.14189, 3.3).

    Args:
        x, target: (batch, ...).
        c: > 0, in units of x; a tiny one gives the plain norm, with gradient 0 instead of none where x is the target.

    Returns:
        float32 (batch,).
    """
    difference = (x.float() - target.float()).square().flatten(1).sum(1)
    return difference / ((difference + c * c).sqrt() + c)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Non-saturating discriminator loss per sample; its optimum is logit = log(p_real/p_fake).

    Args:
        real: logits (batch, heads) on real samples.
        fake: logits (batch, heads) on student samples.
    """
    return (F.softplus(-real.float()) + F.softplus(fake.float())).mean(1)


def generator_loss(fake: Tensor) -> Tensor:
    """Non-saturating generator loss per sample from logits (batch, heads)."""
    return F.softplus(-fake.float()).mean(1)
