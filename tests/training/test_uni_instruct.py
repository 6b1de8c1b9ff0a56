"""Uni-Instruct against the divergence it expands, by quadrature: no network, no sampling error."""

import pytest
import torch
from oracles import SCHEDULE, STUDENT, drawn, made_exact, mixture, on_networks, real_batch, tiny_model
from quadrature import GENERATORS, divergence_decay, integrated, legendre, pairs, started_at_noise

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow
from sublimate.training.losses import F_DIVERGENCES, f_weight_terms, identity_terms
from sublimate.training.objective import Batch
from sublimate.training.objectives.score_identity import ScoreIdentity
from sublimate.training.objectives.uni_instruct import UniInstruct, UniInstructConfig
from sublimate.training.randomness import SampleRandom

TEACHER = mixture([0.3, 0.7], [-1.5, 1.0], [0.4, 0.5])
VE = EDM(0.05**0.5, 2.0)
TABLE = DiscreteVP((1 - torch.linspace(0.01, 0.02**0.5, 1000, dtype=torch.float64).square()).cumprod(0))
# The part of each schedule that is integrated over, as fractions; the first is t in [.2, 1.35].
RANGES = {SCHEDULE: ((0.2 - 0.002) / 1.5688, (1.35 - 0.002) / 1.5688), VE: (0.0, 1.0), TABLE: (0.15, 0.95)}
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


def exact(divergence, schedule=VE, teacher=TEACHER, a=0.8, b=0.2, **options):
    options = {"exact_weighting": True, "time_range": RANGES[schedule], **EXACT, **options}
    model = tiny_model(schedule, "edm" if isinstance(schedule, EDM) else "v_prediction")
    objective = UniInstruct(model, UniInstructConfig(divergence=divergence, **options))
    return started_at_noise(made_exact(objective, teacher, a, b))


def ends(objective):
    """The cleanest and the noisiest time used."""
    schedule = objective.schedule
    return schedule.uniform_time(torch.tensor(objective.config.time_range, dtype=torch.float64))


def levels(objective, count=40):
    """Times and weights of the mean over log-SNR."""
    clean, noisy = objective.schedule.log_snr(ends(objective)).tolist()
    log_snr, weights = legendre(count, noisy, clean)
    return objective.schedule.t_at_log_snr(log_snr), weights


def close(found, expected, tolerance=1e-6):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1.0, float(expected.norm())))


@pytest.mark.slow
@pytest.mark.parametrize("divergence", REFERENCE)
def test_the_gradient_is_that_of_the_expanded_divergence(divergence):
    objective = exact(divergence)
    close(integrated(objective, *levels(objective)), REFERENCE[divergence][:2])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [SCHEDULE, TABLE], ids=["circle", "table"])
@pytest.mark.parametrize("divergence", [name for name in GENERATORS if name != "neyman"])
def test_it_is_so_on_variance_preserving_schedules(divergence, schedule):
    objective = exact(divergence, schedule)
    value, expected = divergence_decay(divergence, schedule, ends(objective), TEACHER, 0.8, 0.2)
    close(integrated(objective, *levels(objective)), expected)
    assert value > 0


@pytest.mark.slow
def test_it_is_so_where_the_ratio_grows_in_the_tails():
    """Neyman's divergence is finite only for a student with lighter tails than the teacher's."""
    teacher = mixture([0.4, 0.6], [-0.5, 0.5], [1.1, 1.2])
    objective = exact("neyman", teacher=teacher)
    _, expected = divergence_decay("neyman", VE, ends(objective), teacher, 0.8, 0.2)
    close(integrated(objective, *levels(objective)), expected)


@pytest.mark.parametrize("divergence", REFERENCE)
def test_the_reference_numbers_contain_the_value_at_the_end(divergence):
    value, gradient = divergence_decay(divergence, VE, ends(exact(divergence)), TEACHER, 0.8, 0.2)
    assert (*gradient.tolist(), value) == pytest.approx(REFERENCE[divergence], abs=2e-6)


def assembled(objective, loss):
    """The measure's integral of loss(h, d^T (mu_p - x0), |d|^2) over levels, z and eps; d in units of mu."""
    schedule, (times, over_times) = objective.schedule, levels(objective)
    z, eps, over_pairs = pairs(84)
    log_snr = schedule.log_snr(ends(objective))
    measure = (log_snr[0] - log_snr[1]) * schedule.log_snr(times).exp() / 2
    batch = drawn(objective, times, z, eps)
    batch = objective.draw(batch)
    x0 = objective.generate(batch["z"], Condition())
    x_t = objective.noised(x0, batch)
    p, q = objective.teacher(x_t, batch["t"]), objective.critic(x_t, batch["t"])
    h, _, _ = f_weight_terms(objective.config.divergence, objective.discriminator(p, batch["t"])[:, 0].exp())
    weights = torch.outer(measure * over_times, over_pairs).flatten()
    return (weights * loss(h, *identity_terms(x0, p, q))).sum()


@pytest.mark.slow
@pytest.mark.parametrize("divergence", REFERENCE)
def test_the_expansion_has_the_divergences_value(divergence):
    """Theorem 3.1: the integral of (g^2/2) E[h |d|^2] over the levels."""
    value = assembled(exact(divergence), lambda h, cross, squared: h * squared)
    assert value.item() == pytest.approx(REFERENCE[divergence][2], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("divergence", "loss", "expected"),
    [
        # The path gradient of h |d|^2 alone, and without the term that Diff-Instruct would add.
        ("reverse_kl", lambda h, cross, squared: squared, (0.0292, -0.3353)),
        ("forward_kl", lambda h, cross, squared: 2 * h * cross - h * squared, (-1.0624, -0.1211)),
    ],
)
def test_without_one_of_its_terms_the_gradient_is_another(divergence, loss, expected):
    objective = exact(divergence)
    assembled(objective, loss).backward()
    found = [objective.student.a.grad.item(), objective.student.b.grad.item()]
    assert found == pytest.approx(expected, abs=1e-4)
    assert found != pytest.approx(REFERENCE[divergence][:2], abs=0.1)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_the_gradient_vanishes_when_the_student_is_the_teacher(divergence):
    objective = exact(divergence, teacher=mixture([1.0], [0.3], [0.6]), a=0.6, b=0.3)
    close(integrated(objective, *levels(objective, 10), points=20), [0.0, 0.0], 1e-12)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_derivatives_of_the_weights(divergence):
    r = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    step = 1e-4
    h, rh1, r2h2 = f_weight_terms(divergence, r)
    above, below = (F_DIVERGENCES[divergence](r * (1 + e)) for e in (step, -step))
    torch.testing.assert_close(h, F_DIVERGENCES[divergence](r))
    torch.testing.assert_close(rh1, (above - below) / (2 * step), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(r2h2, (above - 2 * h + below) / step**2, rtol=1e-5, atol=1e-5)


def test_reverse_kl_is_twice_sid_at_one_half():
    uni = on_networks(UniInstruct, divergence="reverse_kl", gan_weight=0.0)
    sid = on_networks(ScoreIdentity, alpha=0.5)
    found, expected = (o.loss(STUDENT, real_batch(o), 0).total for o in (uni, sid))
    torch.testing.assert_close(found, 2 * expected)
    found, expected = (
        torch.autograd.grad(total, list(o.student.parameters())) for o, total in ((uni, found), (sid, expected))
    )
    for of_uni, of_sid in zip(found, expected, strict=True):
        torch.testing.assert_close(of_uni, 2 * of_sid)


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", "pearson"])
def test_beyond_its_bounds_the_ratio_is_constant_and_so_is_the_weight(divergence):
    bounded = exact(divergence, gan_weight=0.0, ratio_bounds=(0.1, 20.0))
    plain, generator = exact("reverse_kl"), torch.Generator().manual_seed(0)
    x0, x_t = (torch.randn(2, 1, generator=generator).double() for _ in range(2))
    t = torch.tensor([0.5, 1.0], dtype=torch.float64)
    p, q = bounded.teacher(x_t, t), bounded.critic(x_t, t)
    ratio = torch.tensor([0.1, 20.0], dtype=torch.float64)
    h = f_weight_terms(divergence, ratio)[0]
    torch.testing.assert_close(bounded.integrand(x0, x_t, p, q, ratio), h * plain.integrand(x0, x_t, p, q, ratio))


def test_the_adversarial_term_is_normalised_with_the_rest():
    objective = on_networks(UniInstruct, gan_weight=0.5)
    batch = real_batch(objective)
    x0 = objective.sample(batch)
    p = objective.teacher(objective.noised(x0, batch), batch["t"], features=objective.taps)
    logits = objective.discriminator(p, batch["t"])[:, 0]
    distance = (x0 - p.x0).abs()[:, 0]
    loss = objective.loss(STUDENT, batch, 0)
    torch.testing.assert_close(loss.logs["student/gan"], ((1 + (-logits).exp()).log() / distance).mean())
    torch.testing.assert_close(loss.total, loss.logs["student/divergence"] + 0.5 * loss.logs["student/gan"])


def test_times_of_exact_weighting_are_uniform_in_log_snr():
    for schedule in (SCHEDULE, TABLE):
        objective = on_networks(UniInstruct, schedule, exact_weighting=True, time_range=RANGES[schedule])
        clean, noisy = schedule.log_snr(ends(objective)).tolist()
        log_snr = schedule.log_snr(real_batch(objective, 2000)["t"])
        assert noisy <= float(log_snr.min()) and float(log_snr.max()) <= clean
        shares = torch.histc((log_snr - noisy) / (clean - noisy), 4, 0, 1) / len(log_snr)
        assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.04)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), SCHEDULE], ids=["flow", "empty"])
def test_exact_weighting_needs_a_finite_range(schedule):
    bounds = (0.0, 1.0) if isinstance(schedule, RectifiedFlow) else (0.5, 0.5)
    with pytest.raises(ValueError, match=r"objective\.time_range"):
        on_networks(UniInstruct, schedule, exact_weighting=True, time_range=bounds)


def test_only_the_student_is_moved_and_the_critic_is_differentiated():
    objective = on_networks(UniInstruct, gan_weight=0.1)
    seen = []
    objective.critic.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].requires_grad))
    objective.loss(STUDENT, real_batch(objective), 0).total.backward()
    assert seen == [True]
    for name, player in objective.players().items():
        moved = [p.grad is not None and bool(p.grad.any()) for p in player.module.parameters()]
        assert all(moved) if name == "student" else not any(moved)
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_reverse_kl_without_gan_is_data_free():
    assert UniInstruct(tiny_model(), UniInstructConfig(divergence="reverse_kl", gan_weight=0.0)).needs == frozenset()
    assert UniInstruct(tiny_model(), UniInstructConfig(divergence="reverse_kl")).needs == {"images"}
    assert UniInstruct(tiny_model(), UniInstructConfig(gan_weight=0.0)).needs == {"images"}


@pytest.mark.slow
def test_a_short_run_finds_a_teacher_that_can_be_found():
    options = {"time_range": (0.0, 0.8), "exact_weighting": False}
    objective = exact("jensen_shannon", SCHEDULE, mixture([1.0], [0.7], [0.5]), 1.0, 0.0, **options)
    optimizer = torch.optim.Adam(objective.student.parameters(), lr=0.02)
    for step in range(200):
        optimizer.zero_grad()
        batch = Batch(Condition(), SampleRandom(0, step, "student", range(128)))
        objective.loss(STUDENT, objective.prepare(STUDENT, batch, step), step).total.backward()
        optimizer.step()
    assert (objective.student.a.item(), objective.student.b.item()) == pytest.approx((0.5, 0.7), abs=0.03)
