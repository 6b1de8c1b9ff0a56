"""Exact stand-ins for what objectives estimate: a student of known density, its score, and the density ratio.

Teacher and student are one-dimensional: a Gaussian mixture, and x0 = a z + b.
"""

from types import SimpleNamespace

import torch
from torch import nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from sublimate.diffusion.predictions import Parametrization
from sublimate.diffusion.schedules import TrigFlow
from sublimate.training.objective import Batch, Turn
from sublimate.training.players import Player, PlayerConfig
from sublimate.training.randomness import SampleRandom

SCHEDULE = TrigFlow(sigma_data=1.0)
STUDENT = Turn("student", ("student",))


def mixture(weights, means, stds):
    """A one-dimensional mixture in float64."""
    columns = (torch.tensor(values, dtype=torch.float64) for values in (weights, means, stds))
    w, m, s = columns
    return GaussianMixture(w, m[:, None], s)


class Affine(nn.Module):
    """The student x0 = a z + b, whose noised density is N(alpha b, alpha^2 a^2 + sigma^2)."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (a, b))

    def forward(self, x_t, t, condition=None, *, features=()):
        return SimpleNamespace(x0=self.a * x_t + self.b)

    def mixture(self):
        return GaussianMixture(torch.ones(1), self.b.detach().view(1, 1), self.a.detach().abs().view(1))


class ExactCritic(nn.Module):
    """The exact denoiser of the student's own distribution, whatever (a, b) are by now."""

    def __init__(self, student, schedule=SCHEDULE):
        super().__init__()
        self.schedule = schedule
        self.student, self.unused = student, nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t, condition=None, *, features=()):
        return MixtureDenoiser(self.student.mixture(), self.schedule)(x_t, t, condition)


class ExactRatio(nn.Module):
    """log p_t/q_t in place of the discriminator's logit."""

    def __init__(self, teacher, student, schedule=SCHEDULE):
        super().__init__()
        self.schedule = schedule
        self.teacher, self.student, self.unused = teacher, student, nn.Parameter(torch.zeros(1))

    def forward(self, prediction, t):
        c = self.schedule.at(t)
        p, q = (m.marginal(c.alpha, c.sigma) for m in (self.teacher, self.student.mixture().double()))
        return (p.log_prob(prediction.x_t) - q.log_prob(prediction.x_t))[:, None]


def network_call(network, x_t, t, condition, features):
    y = network(x_t)
    return y, {name: torch.cat([y, y.sin(), y.cos(), y * y], 1)[:, None] for name in features}


def tiny_model(schedule=SCHEDULE, parametrization="v_prediction"):
    """A tiny real denoiser of numbers, in a model's place."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 1))
    denoiser = Denoiser(network, network_call, schedule, Parametrization(parametrization))
    return SimpleNamespace(
        denoiser=denoiser,
        latent_shape=(1,),
        null_condition=Condition,
        any_condition=Condition,
        feature_taps=lambda: ("middle",),
    )


def on_networks(cls, schedule=SCHEDULE, **options):
    """The objective on tiny real networks, its critic moved off the teacher; the student trains, from pure noise."""
    objective = cls(tiny_model(schedule), cls.Config(**{"start_log_snr": None, **options}))
    with torch.no_grad():
        for p in objective.critic.parameters():
            p.mul_(1.2)
    for name, player in objective.players().items():
        player.set_trainable(name == "student")
    return objective


def real_batch(objective, size=16):
    """The student's turn on `size` samples, with images."""
    random = SampleRandom(3, 1, "student", range(size))
    return objective.prepare(STUDENT, Batch(Condition(), random, {"images": random.normal((1,))}), 0)


def made_exact(objective, teacher, a, b):
    """The objective with every network replaced by the exact function it estimates; its student trains (a, b)."""
    schedule = objective.schedule
    student = Affine(a, b)
    objective.teacher, objective.taps = MixtureDenoiser(teacher, schedule), ()
    parts = {
        "student": student,
        "critic": ExactCritic(student, schedule),
        "discriminator": ExactRatio(teacher, student, schedule),
    }
    for name, module in parts.items():
        objective._players[name] = Player(module, PlayerConfig(), frozenset(n for n, _ in module.named_parameters()))
    objective._players["student"].set_trainable(True)
    return objective


def drawn(objective, times, z, eps):
    """Replaces the random draws: every pair of z and eps, each (n,), at every one of the times (m,)."""
    n, m = len(z), len(times)
    fixed = {
        "z": z.repeat(m)[:, None],
        "eps": eps.repeat(m)[:, None],
        "eps_real": eps.repeat(m)[:, None],
        "t": times.repeat_interleave(n),
    }
    objective.draw = lambda batch: batch.adding(**fixed)
    return Batch(Condition(), SampleRandom(0, 0, "x", []))


def sobol(power):
    """2^power quasi-random pairs of N(0, 1), float64; two tensors (2^power,)."""
    points = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw_base2(power, dtype=torch.float64)
    return torch.special.ndtri(points.clamp(1e-12, 1 - 1e-12)).unbind(1)


def gradient(objective, batch, step=0):
    """(d loss/da, d loss/db) of the student's turn."""
    with torch.no_grad():
        prepared = objective.prepare(STUDENT, batch, step)
    objective.student.zero_grad()
    objective.loss(STUDENT, prepared, step).total.backward()
    return torch.stack([objective.student.a.grad, objective.student.b.grad])
