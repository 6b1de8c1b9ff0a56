"""EM distillation against exact scores: its identity, its special case, its chains and where they lead."""

import math

import pytest
import torch
from oracles import STUDENT, drawn, gradient, made_exact, mixture, sobol, tiny_model

from sublimate.diffusion.conditions import Condition
from sublimate.training.objective import Batch
from sublimate.training.objectives.em_distillation import EMDistillation, EMDistillationConfig
from sublimate.training.objectives.f_distill import FDistill, FDistillConfig
from sublimate.training.randomness import SampleRandom

ANGLE = math.atan2(0.6, 0.8)  # alpha = .8, sigma = .6
TEACHER = mixture([0.3, 0.7], [-1.5, 1.0], [0.4, 0.5])


def make(**options):
    return EMDistillation(tiny_model(), EMDistillationConfig(start_log_snr=None, **options))


def exact(teacher=TEACHER, a=0.8, b=0.2, **options):
    return made_exact(make(**options), teacher, a, b)


class Noise:
    """Normal numbers of one generator, for as many chains as a batch has."""

    def __init__(self, count, generator):
        self.count, self.generator = count, generator

    def normal(self, shape, device):
        return torch.randn(self.count, *shape, dtype=torch.float64, generator=self.generator)


def chains(objective, count, seed=0, times=(ANGLE,)):
    """A batch of `count` chains at each of the times, the objective's draws included."""
    generator = torch.Generator().manual_seed(seed)
    z, eps = torch.randn(2, count, dtype=torch.float64, generator=generator)
    drawn(objective, torch.tensor(times, dtype=torch.float64), z, eps)
    return Batch(Condition(), Noise(count * len(times), generator))


def test_weighted_by_the_exact_ratio_the_m_step_is_the_gradient_of_forward_kl():
    """grad KL(p_t || q_t) = -E[r (alpha/sigma) eps dG]: the chain replaced by importance weights (quadrature)."""
    z, eps = (draws[:, None] for draws in sobol(17))
    objective = exact()
    student = objective.student
    with torch.no_grad():
        x_t = 0.8 * student(z, None).x0 + 0.6 * eps
    p, q = TEACHER.marginal(0.8, 0.6), student.mixture().marginal(0.8, 0.6)
    ratio = (p.log_prob(x_t) - q.log_prob(x_t)).exp()
    # The loss carries the weight sigma^2/alpha^2.
    batch = Batch(Condition(), SampleRandom(0, 0, "x", []), {"z": z, "direction": -(0.6 / 0.8) * ratio[:, None] * eps})
    loss = objective.loss(STUDENT, batch, 0).total * (0.8 / 0.6) ** 2
    found = torch.stack(torch.autograd.grad(loss, [student.a, student.b]))
    expected = torch.tensor([-0.496816663, -0.041580042], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("normalized", [False, True])
def test_one_step_without_z_is_variational_score_distillation_per_sample(normalized):
    em = exact(langevin_steps=1, step_eps=0.3, step_z=0.0, sample_normalization=normalized)
    options = {
        "divergence": "reverse_kl",
        "gan_weight": 0.0,
        "guidance_scale": 1.0,
        "sample_normalization": normalized,
    }
    vsd = made_exact(FDistill(tiny_model(), FDistillConfig(**options)), TEACHER, 0.8, 0.2)
    z, eps = sobol(6)
    times = torch.tensor([0.2, 0.9, 1.4], dtype=torch.float64)
    with torch.no_grad():
        drawn(em, times, z, eps)
        found = em.prepare(STUDENT, Batch(Condition(), SampleRandom(0, 0, "x", range(192))), 0)
        plain = vsd.prepare(STUDENT, drawn(vsd, times, z, eps), 0)
        x0 = vsd.generate(plain["z"], Condition())
        expected = 0.3 * vsd._compared(x0, plain)[0]
    # w(t) gamma_eps = gamma_eps in units of mu_q - mu_p.
    torch.testing.assert_close(found["direction"].float(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found["z"], plain["z"])


def test_cancellation_is_what_the_noise_did_taken_off():
    plain, cancelled = (
        exact(langevin_steps=6, step_eps=0.2, step_z=0.05, noise_cancellation=on) for on in (False, True)
    )
    with torch.no_grad():
        one = plain.prepare(STUDENT, chains(plain, 64, seed=3), 0)
        two = cancelled.prepare(STUDENT, chains(cancelled, 64, seed=3), 0)
        start = plain.draw(chains(plain, 64, seed=3))["z"]
    assert torch.equal(one["z"], two["z"]) and not torch.equal(one["z"], start)
    generator = torch.Generator().manual_seed(3)
    _, contribution = torch.randn(2, 64, dtype=torch.float64, generator=generator)
    for _ in range(6):
        torch.randn(64, 1, dtype=torch.float64, generator=generator)  # z's
        fresh = torch.randn(64, 1, dtype=torch.float64, generator=generator)[:, 0]
        contribution = (1 - 0.2) * contribution + math.sqrt(2 * 0.2) * fresh
    removed = (two["direction"] - one["direction"])[:, 0] * (0.8 / 0.6)
    torch.testing.assert_close(removed, contribution, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step_z", "cancelled", "expected"),
    [
        (0.0, False, (-0.346, -0.070)),
        (0.0, True, (-0.343, -0.069)),
        (1.6e-5, False, (-0.341, -0.074)),
        (1.6e-5, True, (-0.343, -0.070)),
        (0.05, False, (-0.436, -0.061)),
        (0.05, True, (-0.380, -0.057)),
    ],
)
def test_gradients_of_sixteen_steps(step_z, cancelled, expected):
    """Reference: 4e5 chains each, to .0025, cancelled .001; forward KL (-.4968, -.0416), reverse (-.3531, -.1194)."""
    objective = exact(langevin_steps=16, step_eps=0.16, step_z=step_z, noise_cancellation=cancelled)
    # The loss carries the weight sigma^2/alpha^2.
    found = gradient(objective, chains(objective, 200_000)) * (0.8 / 0.6) ** 2
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0.004 if cancelled else 0.01
    )


@pytest.mark.slow
def test_more_steps_lead_from_reverse_towards_forward_kl():
    """Teacher .25 N(-1,.16) + .75 N(1,.16), t in [.3, .6]: minima (.8669, .5088) and, forward, a = .9539."""
    teacher = mixture([0.25, 0.75], [-1.0, 1.0], [0.4, 0.4])
    times = 0.3 + 0.3 * (torch.arange(4, dtype=torch.float64) + 0.5) / 4

    def minimiser(steps, updates, **options):
        objective = exact(teacher, 1.0, 0.2, langevin_steps=steps, **options)
        optimizer = torch.optim.Adam(objective.student.parameters(), lr=0.02)
        found = []
        for update in range(updates):
            gradient(objective, chains(objective, 2000, seed=update, times=times.tolist()))
            optimizer.step()
            found.append(torch.stack([objective.student.a.detach(), objective.student.b.detach()]))
        return torch.stack(found[-40:]).mean(0).tolist()

    one = minimiser(1, 140, step_eps=0.1, step_z=0.0)
    assert one == pytest.approx((0.8669, 0.5088), abs=0.015)
    many = minimiser(30, 120, step_eps=0.1, step_z=0.02, noise_cancellation=False)
    assert many[0] > one[0] + 0.05


def test_the_chain_keeps_weights_out_of_its_graph_and_gives_them_back():
    objective = make(langevin_steps=2, step_z=0.1, guidance_scale=1.0)
    student = objective.players()["student"]
    student.set_trainable(True)
    with torch.no_grad():  # off the teacher, where every direction is zero
        for parameter in objective.critic.parameters():
            parameter.mul_(1.2)
    required = []

    def note(module, inputs, output):
        required.append([p.requires_grad for p in module.parameters()])

    objective.student.network.register_forward_hook(note)
    batch = Batch(Condition(), SampleRandom(0, 0, "student", range(8)))
    with torch.no_grad():
        prepared = objective.prepare(STUDENT, batch, 0)
    assert len(required) == 2 and not any(map(any, required))
    assert all(p.requires_grad for p in student.trainable().values())
    objective.loss(STUDENT, prepared, 0).total.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in student.trainable().values())
    assert all(p.grad is None for p in objective.critic.parameters())
    assert not prepared["z"].requires_grad and not prepared["direction"].requires_grad


def test_it_needs_no_images():
    assert make().needs == frozenset()
    start = EMDistillation(tiny_model(), EMDistillationConfig(start_log_snr=-2.0))
    assert float(start.schedule.log_snr(start.start)) == pytest.approx(-2.0)
    assert start.exports().start_time == start.start
