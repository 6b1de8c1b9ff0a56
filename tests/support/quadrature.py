"""Expectations without sampling error: an objective's gradient by Gauss quadrature, a divergence's on a grid."""

import math

import numpy as np
import torch
from oracles import Affine, drawn, gradient

from sublimate.diffusion.schedules import EDM

# D_f's generators, as in f-distill's table 1.
GENERATORS = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened_reverse_kl": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r).square() / r,
    "pearson": lambda r: (r - 1).square(),
}


def hermite(n):
    """Nodes and weights of N(0, 1), (n,) each."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(x), torch.from_numpy(w / w.sum())


def legendre(n, low, high):
    """Nodes in [low, high] and weights whose sum is 1."""
    x, w = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((x + 1) / 2 * (high - low) + low), torch.from_numpy(w / 2)


def pairs(n):
    """Nodes z, eps and weights of N(0, 1) x N(0, 1), (n^2,) each."""
    x, w = hermite(n)
    z, eps = (part.flatten() for part in torch.meshgrid(x, x, indexing="ij"))
    return z, eps, torch.outer(w, w).flatten()


def started_at_noise(objective):
    """The objective, its student given z itself whatever the schedule's scale."""
    if isinstance(objective.schedule, EDM):
        objective.start = 1.0
    return objective


def integrated(objective, times, over_times, points=84):
    """The gradient in (a, b) of sum_i over_times_i E_{z,eps}[loss of a sample at times_i], through `loss` itself.

    Losses are means over samples and reach the student through x0 alone, so that its gradient can be reweighted there.

    Args:
        times, over_times: (m,), as of `legendre`.
        points: Hermite nodes for each of z and eps.
    """
    z, eps, over_pairs = pairs(points)
    weights = torch.outer(over_times, over_pairs).flatten()
    generate = objective.generate

    def generated(z, condition):
        x0 = generate(z, condition)
        if x0.requires_grad:
            x0.register_hook(lambda g: g * (len(weights) * weights)[:, None])
        return x0

    objective.generate = generated
    try:
        return gradient(objective, drawn(objective, times, z, eps))
    finally:
        objective.generate = generate


def divergence(name, schedule, t, teacher, a, b):
    """Value and (a, b)-gradient of D_f(p_t || q_t) at one level, by the trapezoidal rule and autograd."""
    student, c = Affine(a, b), schedule.at(t)
    x = torch.linspace(-14, 14, 8001, dtype=torch.float64)[:, None]
    variance = (c.alpha * student.a) ** 2 + c.sigma**2
    log_q = -0.5 * (x[:, 0] - c.alpha * student.b) ** 2 / variance - 0.5 * torch.log(2 * math.pi * variance)
    r = (teacher.marginal(c.alpha, c.sigma).log_prob(x) - log_q).exp()
    value = torch.trapezoid(log_q.exp() * GENERATORS[name](r), x[:, 0])
    return value.item(), torch.stack(torch.autograd.grad(value, [student.a, student.b]))


def divergence_decay(name, schedule, ends, teacher, a, b):
    """Value and (a, b)-gradient of D_f(p_t0 || q_t0) - D_f(p_T || q_T), the ends being t0 and T."""
    (first, first_gradient), (last, last_gradient) = (divergence(name, schedule, t, teacher, a, b) for t in ends)
    return first - last, first_gradient - last_gradient
