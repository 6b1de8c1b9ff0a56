"""SiD against the exact expansion of reverse KL, the published formula, and the point where every alpha rests."""

import pytest
import torch
from oracles import SCHEDULE, STUDENT, made_exact, mixture, on_networks, real_batch, tiny_model
from quadrature import integrated, legendre, started_at_noise

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.schedules import EDM
from sublimate.training.objective import Batch
from sublimate.training.objectives.score_identity import ScoreIdentity, ScoreIdentityConfig
from sublimate.training.randomness import SampleRandom

TEACHER = mixture([0.3, 0.7], [-1.5, 1.0], [0.4, 0.5])
VE = EDM(0.05**0.5, 2.0)
ALPHAS = (0.5, 1.0, 1.2)


def exact(alpha, teacher, a, b, schedule=VE, **options):
    model = tiny_model(schedule, "edm" if isinstance(schedule, EDM) else "v_prediction")
    objective = ScoreIdentity(model, ScoreIdentityConfig(alpha=alpha, start_log_snr=None, **options))
    return started_at_noise(made_exact(objective, teacher, a, b))


def weighted_as_reverse_kl(alpha, teacher, a, b, levels=40, points=84):
    """Twice SiD's gradient, levels weighted by the exact expansion's alpha^2/(2 sigma^2) d(log-SNR)."""
    objective = exact(alpha, teacher, a, b, sample_normalization=False)
    clean, noisy = (float(VE.log_snr(t)) for t in (VE.t_min, VE.t_max))
    log_snr, weights = legendre(levels, noisy, clean)
    over_times = weights * (clean - noisy) * log_snr.exp() / 2
    return 2 * integrated(objective, VE.t_at_log_snr(log_snr), over_times, points)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alpha", "expected", "tolerance"),
    [(0.5, (-1.0241602, -0.5403363), 1e-6), (1.0, (-1.0534, -0.2051), 1e-4), (1.2, (-1.0650, -0.0710), 1e-4)],
)
def test_it_is_half_of_exact_reverse_kl_at_one_half_only(alpha, expected, tolerance):
    found = weighted_as_reverse_kl(alpha, TEACHER, 0.8, 0.2)
    assert found.tolist() == pytest.approx(expected, abs=tolerance)


def test_every_alpha_rests_at_the_teacher_and_nears_it_alike():
    """The part that alpha multiplies is of second order in the distance, the gradient itself of first."""
    teacher = mixture([1.0], [0.3], [0.6])
    gradients = {
        distance: torch.stack(
            [weighted_as_reverse_kl(alpha, teacher, 0.6 + distance, 0.3, 20, 20) for alpha in ALPHAS]
        )
        for distance in (0.0, 0.01, 0.02)
    }
    assert gradients[0.0].abs().max() < 1e-12
    whole = gradients[0.02].norm(dim=1) / gradients[0.01].norm(dim=1)
    assert whole.tolist() == pytest.approx([2.0] * 3, abs=0.15)
    parts = [(g[1:] - g[0]).norm(dim=1) for g in (gradients[0.01], gradients[0.02])]
    assert (parts[1] / parts[0]).tolist() == pytest.approx([4.0] * 2, abs=0.3)


@pytest.mark.parametrize(("gan_weight", "alpha"), [(0.0, 1.2), (1e-4, 1.0)])
def test_the_loss_is_the_published_one(gan_weight, alpha):
    """100 (y_real - y_fake) ((y_real - y) - alpha (y_real - y_fake)) to 0.01 GAN, both over mean|y - y_real|."""
    objective = on_networks(ScoreIdentity, gan_weight=gan_weight)
    batch = real_batch(objective)
    y = objective.sample(batch)
    y_t = objective.noised(y, batch)
    real, fake = objective.teacher(y_t, batch["t"], features=objective.taps), objective.critic(y_t, batch["t"])
    distance = (y - real.x0).detach().abs()
    expected = ((real.x0 - fake.x0) * ((real.x0 - y) - alpha * (real.x0 - fake.x0)) / distance).mean()
    if gan_weight:
        logits = objective.discriminator(real, batch["t"])
        expected = expected + 0.01 / 100 * ((1 + (-logits).exp()).log() / distance).mean()
    found = objective.loss(STUDENT, batch, 0).total
    torch.testing.assert_close(found, expected)
    weights = list(objective.student.parameters())
    for a, b in zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(a, b)


def test_alpha_can_be_chosen():
    losses = []
    for alpha in (0.0, 1.0, 2.0):
        objective = on_networks(ScoreIdentity, alpha=alpha, gan_weight=0.1)
        losses.append(objective.loss(STUDENT, real_batch(objective), 0).total.item())
    assert losses[0] - losses[1] == pytest.approx(losses[1] - losses[2], rel=1e-3)
    assert losses[0] > losses[1]


def test_only_the_student_is_moved_and_the_critic_is_differentiated():
    objective = on_networks(ScoreIdentity, gan_weight=0.1)
    seen = []
    objective.critic.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].requires_grad))
    objective.loss(STUDENT, real_batch(objective), 0).total.backward()
    assert seen == [True]
    for name, player in objective.players().items():
        moved = [p.grad is not None and bool(p.grad.any()) for p in player.module.parameters()]
        assert all(moved) if name == "student" else not any(moved)
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_it_starts_at_the_published_noise_and_needs_no_data():
    objective = ScoreIdentity(tiny_model(EDM(), "edm"), ScoreIdentityConfig())
    assert objective.start == pytest.approx(2.5)
    assert objective.needs == frozenset()
    # The Karras curve up to 80 % of its length.
    assert float(objective.schedule.uniform_time(torch.tensor(1.0), *objective.config.time_range)) == pytest.approx(
        24.4, abs=0.05
    )
    adversarial = ScoreIdentity(tiny_model(EDM(), "edm"), ScoreIdentityConfig(gan_weight=1e-4))
    assert adversarial.needs == {"images"}


@pytest.mark.slow
def test_a_short_run_finds_a_teacher_that_can_be_found():
    objective = exact(None, mixture([1.0], [0.7], [0.5]), 0.65, 0.6, SCHEDULE)
    optimizer = torch.optim.Adam(objective.student.parameters(), lr=0.02)
    for step in range(200):
        optimizer.zero_grad()
        batch = Batch(Condition(), SampleRandom(0, step, "student", range(128)))
        objective.loss(STUDENT, objective.prepare(STUDENT, batch, step), step).total.backward()
        optimizer.step()
    assert (objective.student.a.item(), objective.student.b.item()) == pytest.approx((0.5, 0.7), abs=0.03)
