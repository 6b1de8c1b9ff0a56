"""Uni-Instruct and SiD against the divergence they expand, by quadrature."""

import math

import numpy as np
import pytest
import torch
from oracles import SCHEDULE, STUDENT, Affine, drawn, made_exact, mixture, tiny_model

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.schedules import EDM
from sublimate.training.losses import F_DIVERGENCES, f_weight_terms, identity_terms
from sublimate.training.objective import Batch
from sublimate.training.objectives.score_identity import ScoreIdentity, ScoreIdentityConfig
from sublimate.training.objectives.uni_instruct import UniInstruct, UniInstructConfig
from sublimate.training.randomness import SampleRandom

TEACHER = mixture([0.3, 0.7], [-1.5, 1.0], [0.4, 0.5])
SIGMAS = 0.05**0.5, 2.0
VE = EDM(*SIGMAS)
POINTS = 84
EXACT = {"gan_weight": 0.0, "ratio_bounds": None, "start_log_snr": None}

# d/d(a, b) of D_f(t0) - D_f(T), and its value, for the student .8 z + .2 and noise of variance .05 to 4 added.
REFERENCE = {
    "reverse_kl": (-1.0241602, -0.5403363, 0.5888608),
    "forward_kl": (-1.4755587, -0.0616879, 0.5171633),
    "jensen_shannon": (-0.4886314, -0.1542522, 0.2445729),
    "jeffreys": (-2.4997189, -0.6020242, 1.1060242),
    "softened_reverse_kl": (-0.5355288, -0.3860841, 0.3442880),
    "squared_hellinger": (-0.2735643, -0.0767495, 0.1295212),
    "pearson": (-9.5046975, 2.7315920, 1.5362657),
}
GENERATORS = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
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


def exact(cls, config, schedule, teacher=TEACHER, a=0.8, b=0.2, **options):
    parametrization = "edm" if isinstance(schedule, EDM) else "v_prediction"
    objective = made_exact(cls(tiny_model(schedule, parametrization), config(**options)), teacher, a, b)
    objective.start = 1.0 if isinstance(schedule, EDM) else objective.start  # where the pure noise is z itself
    return objective


def integrated(objective, loss_of, levels=40, points=POINTS):
    """Gradient in (a, b) of the mean of `loss_of(batch)` over log-SNR, z and eps, by Gauss quadrature."""
    clean, noisy = (float(objective.schedule.log_snr(t)) for t in ends(objective.schedule))
    log_snr, over_levels = legendre(levels, noisy, clean)
    times = objective.schedule.t_at_log_snr(log_snr)
    x, w = hermite(points)
    z, eps = (part.flatten() for part in torch.meshgrid(x, x, indexing="ij"))
    weights = (over_levels[:, None] * torch.outer(w, w).flatten()).flatten()
    batch = drawn(objective, times, z, eps)
    batch = objective.draw(batch)
    objective.student.zero_grad()
    (weights * loss_of(batch)).sum().backward()
    return torch.stack([objective.student.a.grad, objective.student.b.grad])


def ends(schedule):
    """Cleanest and noisiest time of the tests."""
    return SIGMAS if isinstance(schedule, EDM) else (0.2, 1.35)


def uni(divergence, schedule=VE, **options):
    low, high = ends(schedule)
    fractions = (0.0, 1.0)
    if not isinstance(schedule, EDM):
        fractions = tuple((t - schedule.t_min) / (schedule.t_max - schedule.t_min) for t in (low, high))
    chosen = {"divergence": divergence, "exact_weighting": True, "time_range": fractions, **EXACT, **options}
    return exact(UniInstruct, UniInstructConfig, schedule, **chosen)


def uni_losses(objective):
    def losses(batch):
        x0 = objective.generate(batch["z"], Condition())
        x_t = objective.noised(x0, batch)
        q, p = objective.critic(x_t, batch["t"]), objective.teach(x_t, batch)
        ratio = objective._ratio(objective.discriminator(p, batch["t"]), x0)
        return objective._weight(x0, p, batch) * objective.integrand(x0, x_t, p, q, ratio)

    return losses


def divergence_gradient(divergence, schedule):
    """Value and gradient of D_f(t0) - D_f(T) by the trapezoidal rule and autograd."""
    student = Affine(0.8, 0.2)
    x = torch.linspace(-14, 14, 8001, dtype=torch.float64)[:, None]
    total = torch.zeros((), dtype=torch.float64)
    for sign, t in zip((1, -1), ends(schedule), strict=True):
        c = schedule.at(t)
        variance = (c.alpha * student.a) ** 2 + c.sigma**2
        log_q = -0.5 * (x[:, 0] - c.alpha * student.b) ** 2 / variance - 0.5 * torch.log(2 * math.pi * variance)
        r = (TEACHER.marginal(c.alpha, c.sigma).log_prob(x) - log_q).exp()
        total = total + sign * torch.trapezoid(log_q.exp() * GENERATORS[divergence](r), x[:, 0])
    return total.item(), torch.stack(torch.autograd.grad(total, [student.a, student.b]))


@pytest.mark.parametrize("divergence", REFERENCE)
def test_the_gradient_is_that_of_the_expanded_divergence(divergence):
    objective = uni(divergence)
    found = integrated(objective, uni_losses(objective))
    expected = torch.tensor(REFERENCE[divergence][:2], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * max(1.0, float(expected.norm())))


@pytest.mark.parametrize("divergence", GENERATORS)
def test_it_is_so_on_a_variance_preserving_schedule(divergence):
    objective = uni(divergence, SCHEDULE)
    found = integrated(objective, uni_losses(objective))
    value, expected = divergence_gradient(divergence, SCHEDULE)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * max(1.0, float(expected.norm())))
    assert value > 0


@pytest.mark.parametrize("divergence", GENERATORS)
def test_the_reference_numbers_contain_the_value_at_the_end(divergence):
    value, gradient = divergence_gradient(divergence, VE)
    assert (*gradient.tolist(), value) == pytest.approx(REFERENCE[divergence], abs=2e-6)


@pytest.mark.parametrize("divergence", REFERENCE)
def test_the_expansion_has_the_divergences_value(divergence):
    """The integral of (g^2/2) E[h |d|^2] over levels is D_f(t0) - D_f(T)."""
    objective, found = uni(divergence), []

    def density(batch):
        x0 = objective.generate(batch["z"], Condition())
        x_t = objective.noised(x0, batch)
        q, p = objective.critic(x_t, batch["t"]), objective.teach(x_t, batch)
        h, _, _ = f_weight_terms(divergence, objective._ratio(objective.discriminator(p, batch["t"]), x0))
        losses = objective._weight(x0, p, batch) * h * (p.x0 - q.x0).square()[:, 0]
        found.append(losses.detach())
        return losses

    integrated(objective, density)
    (_, w), (_, levels) = hermite(POINTS), legendre(40, 0.0, 1.0)
    weights = (levels[:, None] * torch.outer(w, w).flatten()).flatten()
    assert float((weights * found[0]).sum()) == pytest.approx(REFERENCE[divergence][2], abs=2e-6)


@pytest.mark.parametrize(
    ("divergence", "omitted", "expected"),
    [
        # The path gradient of h |d|^2 alone, and without the term that Diff-Instruct would add.
        ("reverse_kl", "identity", (0.0292, -0.3353)),
        ("forward_kl", "diff_instruct", (-1.0624, -0.1211)),
    ],
)
def test_a_gradient_without_one_of_its_terms_is_another(divergence, omitted, expected):
    objective = uni(divergence)

    def lacking(batch):
        x0 = objective.generate(batch["z"], Condition())
        x_t = objective.noised(x0, batch)
        q, p = objective.critic(x_t, batch["t"]), objective.teach(x_t, batch)
        weight = objective._weight(x0, p, batch)
        if omitted == "identity":
            return weight * (p.x0 - q.x0).square()[:, 0]
        h, _, _ = f_weight_terms(divergence, objective._ratio(objective.discriminator(p, batch["t"]), x0))
        cross, squared = identity_terms(x0, p, q)
        return weight * (2 * h * cross - h * squared)

    found = integrated(objective, lacking)
    assert found.tolist() == pytest.approx(expected, abs=2e-4)
    assert found.tolist() != pytest.approx(REFERENCE[divergence][:2], abs=0.1)


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.5, (-1.0241602, -0.5403363)), (1.0, (-1.0534, -0.2051)), (1.2, (-1.0650, -0.0710))]
)
def test_sid_is_half_of_exact_reverse_kl_at_one_half_only(alpha, expected):
    options = {"alpha": alpha, "sample_normalization": False, "start_log_snr": None, "time_range": (0.0, 1.0)}
    objective = exact(ScoreIdentity, ScoreIdentityConfig, VE, **options)
    clean, noisy = (float(VE.log_snr(t)) for t in SIGMAS)

    def losses(batch):
        # The objective's mean over one sample at a time, times the weight of exact reverse KL's mu-form.
        x0 = objective.generate(batch["z"], Condition())
        x_t = objective.noised(x0, batch)
        q, p = objective.critic(x_t, batch["t"]), objective.teach(x_t, batch)
        weight = (clean - noisy) * VE.log_snr(batch["t"]).exp() / 2
        return 2 * weight * objective.losses(x0, p, q)

    found = integrated(objective, losses)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_derivatives_of_the_weights(divergence):
    r = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    step = 1e-4
    h, rh1, r2h2 = f_weight_terms(divergence, r)
    above, below = (F_DIVERGENCES[divergence](r * (1 + e)) for e in (step, -step))
    torch.testing.assert_close(rh1, (above - below) / (2 * step), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(r2h2, (above - 2 * h + below) / step**2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [UniInstruct, ScoreIdentity])
def test_only_the_student_is_moved_and_the_critic_is_differentiated(cls):
    objective = cls(tiny_model(), cls.Config(start_log_snr=None, gan_weight=0.1))
    for name, player in objective.players().items():
        player.set_trainable(name == "student")
    random = SampleRandom(0, 0, "student", range(8))
    batch = Batch(Condition(), random, {"images": random.normal((1,))})
    seen = []
    objective.critic.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].requires_grad))
    objective.loss(STUDENT, objective.prepare(STUDENT, batch, 0), 0).total.backward()
    assert all(bool(p.grad.any()) for p in objective.players()["student"].trainable().values())
    assert all(
        p.grad is None for name in ("critic", "discriminator") for p in objective._players[name].module.parameters()
    )
    assert seen == [True]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["uni_instruct", "score_identity"])
def test_a_short_run_finds_the_teacher_where_it_can_be_found(method):
    teacher = mixture([1.0], [0.7], [0.5])
    if method == "uni_instruct":
        objective = exact(UniInstruct, UniInstructConfig, SCHEDULE, teacher, 1.0, 0.0, **EXACT)
    else:
        objective = exact(ScoreIdentity, ScoreIdentityConfig, SCHEDULE, teacher, 0.65, 0.6, start_log_snr=None)
    optimizer = torch.optim.Adam(objective.student.parameters(), lr=0.02)
    for step in range(200):
        random = SampleRandom(0, step, "student", range(128))
        batch = objective.prepare(STUDENT, Batch(Condition(), random), step)
        optimizer.zero_grad()
        objective.loss(STUDENT, batch, step).total.backward()
        optimizer.step()
    assert (objective.student.a.item(), objective.student.b.item()) == pytest.approx((0.5, 0.7), abs=0.03)


def test_reverse_kl_without_gan_is_data_free():
    assert UniInstruct(tiny_model(), UniInstructConfig(divergence="reverse_kl", gan_weight=0.0)).needs == frozenset()
    assert UniInstruct(tiny_model(), UniInstructConfig()).needs == {"images"}
    assert ScoreIdentity(tiny_model(), ScoreIdentityConfig()).needs == frozenset()
