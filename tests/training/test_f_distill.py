"""f-distill against analytic oracles: 1-D Gaussian mixtures with exact scores, ratios and divergences."""

import math
from types import SimpleNamespace

import pytest
import torch
from oracles import SCHEDULE, STUDENT, drawn, gradient, made_exact, mixture, sobol, tiny_model
from quadrature import GENERATORS

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.predictions import add_noise
from sublimate.diffusion.schedules import RectifiedFlow
from sublimate.pipelines.discriminator import Discriminator
from sublimate.training.losses import F_DIVERGENCES, discriminator_loss
from sublimate.training.objective import Batch, Turn
from sublimate.training.objectives.f_distill import FDistill, FDistillConfig
from sublimate.training.randomness import SampleRandom

CRITIC = Turn("critic0", ("critic", "discriminator"))
EXACT = {
    "ratio_bounds": None,
    "ratio_normalization": False,
    "weight_normalization": False,
    "sample_normalization": False,
    "gan_weight": 0.0,
    "guidance_scale": 1.0,
}

# Teacher .3 N(-1.5, .4^2) + .7 N(1, .5^2), student x0 = .8 z + .2, alpha = .8, sigma = .6. Quadrature of the
# divergence and its autograd gradient in (a, b); "jensen_shannon" is twice the usual divergence.
GRADIENTS = {
    "reverse_kl": (-0.353146746, -0.119422715),
    "forward_kl": (-0.496816663, -0.041580042),
    "jensen_shannon": (-0.192878567, -0.047169215),
    "softened_reverse_kl": (-0.160268179, -0.072253501),
    "squared_hellinger": (-0.100941622, -0.022057163),
    "jeffreys": (-0.849963409, -0.161002757),
    "neyman": (-0.645460422, -0.337164622),
    "pearson": (-1.949994788, 0.371636510),
}


def plain_objective(**options):
    """The objective on a tiny real denoiser; every test starts from this constructor."""
    return FDistill(tiny_model(), FDistillConfig(**options))


def test_bins_of_an_infinite_range_are_refused():
    config = FDistillConfig(divergence="jensen_shannon", time_range=(0.02, 1.0), guidance_scale=1.0)
    with pytest.raises(ValueError, match="ratio_bins divide the log-SNR, which runs from -inf"):
        FDistill(tiny_model(RectifiedFlow()), config)
    FDistill(tiny_model(RectifiedFlow()), config.model_copy(update={"ratio_bins": 1}))


def oracle_objective(divergence, teacher, a, b, time_range=(0.02, 0.98)):
    """The objective with every network replaced by the exact function it estimates."""
    return made_exact(plain_objective(divergence=divergence, time_range=time_range, **EXACT), teacher, a, b)


@pytest.mark.parametrize("divergence", GRADIENTS)
def test_gradient_is_that_of_the_divergence(divergence):
    teacher = mixture([0.3, 0.7], [-1.5, 1.0], [0.4, 0.5])
    objective = oracle_objective(divergence, teacher, 0.8, 0.2)
    batch = drawn(objective, torch.tensor([math.atan2(0.6, 0.8)], dtype=torch.float64), *sobol(17))
    # The loss carries the weight sigma^2/alpha^2 (pseudo_target's docstring).
    found = gradient(objective, batch).double() * (0.8 / 0.6) ** 2
    expected = torch.tensor(GRADIENTS[divergence], dtype=torch.float64)
    # Heavy-tailed weights converge slowly.
    tolerance = 2e-2 if divergence in ("pearson", "neyman") else 2e-3
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.norm()))


@pytest.mark.parametrize("divergence", GRADIENTS)
def test_gradient_vanishes_when_the_student_is_the_teacher(divergence):
    objective = oracle_objective(divergence, mixture([1.0], [0.3], [0.6]), 0.6, 0.3)
    batch = drawn(objective, torch.tensor([0.4, 0.9], dtype=torch.float64), *sobol(10))
    assert gradient(objective, batch).abs().max() < 1e-6


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_weight_is_the_second_derivative_of_f(divergence):
    r = torch.linspace(0.1, 20, 50, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(GENERATORS[divergence](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(F_DIVERGENCES[divergence](r), second * r * r)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("divergence", "minimiser"), [("reverse_kl", (0.8669, 0.5088)), ("forward_kl", (0.9539, 0.5000))]
)
def test_a_short_run_reaches_the_known_minimiser(divergence, minimiser):
    """Teacher .25 N(-1,.16) + .75 N(1,.16), t uniform in [.3, .6]: one minimum, by quadrature and BFGS."""
    objective = oracle_objective(divergence, mixture([0.25, 0.75], [-1.0, 1.0], [0.4, 0.4]), 1.2, 0.0)
    times = 0.3 + 0.3 * (torch.arange(6, dtype=torch.float64) + 0.5) / 6
    batch = drawn(objective, times, *sobol(11))
    optimizer = torch.optim.Adam(objective.student.parameters(), lr=0.03)
    for _ in range(150):
        gradient(objective, batch)
        optimizer.step()
    found = (objective.student.a.item(), objective.student.b.item())
    assert found == pytest.approx(minimiser, abs=0.01)


def real_batch(size):
    random = SampleRandom(3, 1, "student", range(size))
    return Batch(Condition(), random, {"images": random.normal((1,))})


def test_reverse_kl_is_dmd2_bit_for_bit():
    """Yin et al. 2024, arXiv 2405.14867: grad = (mu_fake - mu_real) / mean|x - mu_real|, written out here."""
    objective = plain_objective(divergence="reverse_kl", gan_weight=0.0, guidance_scale=1.0)
    objective._players["student"].set_trainable(True)
    with torch.no_grad():
        for p in objective.critic.parameters():
            p.mul_(1.1)
    batch = real_batch(16)
    with torch.no_grad():
        prepared = objective.prepare(STUDENT, batch, 0)
    loss = objective.loss(STUDENT, prepared, 0).total
    (found,) = torch.autograd.grad(loss, objective.student.network[2].weight)

    z, eps, t = prepared["z"], prepared["eps"], prepared["t"]
    x = objective.student(z, SCHEDULE.t_max, Condition()).x0
    x_t = add_noise(SCHEDULE, x.detach(), eps, t)
    with torch.no_grad():
        fake, real = objective.critic(x_t, t, Condition()).x0, objective.teacher(x_t, t, Condition()).x0
        direction = (fake - real) / (x - real).abs().mean(1, keepdim=True).clamp_min(1e-6)
        target = x - direction
    expected_loss = 0.5 * (x - target).square().mean()
    (expected,) = torch.autograd.grad(expected_loss, objective.student.network[2].weight)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_reverse_kl_without_gan_needs_no_images():
    def needs(**options):
        return plain_objective(guidance_scale=1.0, **options).needs

    assert needs(divergence="reverse_kl", gan_weight=0.0) == frozenset()
    assert needs(divergence="reverse_kl", gan_weight=0.1) == {"images"}
    assert needs(divergence="jensen_shannon", gan_weight=0.0) == {"images"}


def test_guidance_of_an_unconditional_model_is_refused():
    with pytest.raises(ValueError, match=r"guidance_scale.*1\.75.*no null condition"):
        plain_objective()


@pytest.mark.slow
def test_discriminator_learns_the_log_ratio():
    torch.manual_seed(0)
    frequencies = torch.randn(16)
    judge = Discriminator({"x": 16}, width=32, maps=False)
    optimizer = torch.optim.Adam(judge.parameters(), lr=3e-3)

    def logits(x):
        waves = torch.cat([(x * frequencies[:8]).sin(), (x * frequencies[8:]).cos()], 1)
        return judge(SimpleNamespace(features={"x": waves[:, None]}), None)

    for _ in range(600):
        real, fake = 0.5 + 0.7 * torch.randn(512, 1), torch.randn(512, 1)
        optimizer.zero_grad()
        discriminator_loss(logits(real), logits(fake)).mean().backward()
        optimizer.step()
    x = torch.linspace(-0.8, 1.8, 27)[:, None]
    exact = torch.distributions.Normal(0.5, 0.7).log_prob(x) - torch.distributions.Normal(0.0, 1.0).log_prob(x)
    assert (logits(x) - exact).abs().mean() < 0.15


def test_ratio_normalisation_pools_by_noise_level():
    """A ratio that depends on the level alone becomes one; halves of the batch then weigh the same."""
    objective = plain_objective(
        divergence="forward_kl", ratio_bounds=None, weight_normalization=False, ratio_bins=4, guidance_scale=1.0
    )
    t = torch.tensor([0.3] * 8 + [1.3] * 8, dtype=torch.float64)
    ratio = torch.where(t > 1, 2.0, -1.0).exp()
    torch.testing.assert_close(objective._weight(ratio, t), torch.ones(16))
    saved = objective.state()["bin_means"]
    assert sorted(saved.tolist()) == pytest.approx(sorted([1.0, 1.0, math.exp(2.0), math.exp(-1.0)]))


def test_only_the_turns_players_receive_gradients():
    objective = plain_objective(guidance_scale=1.0)
    for turn in (STUDENT, CRITIC):
        for name, player in objective.players().items():
            player.set_trainable(name in turn.trains)
        with torch.no_grad():
            batch = objective.prepare(turn, real_batch(4), 0)
        objective.loss(turn, batch, 0).total.backward()
        for name, player in objective.players().items():
            touched = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in player.trainable().values()]
            assert any(touched) == (name in turn.trains), (turn.name, name)
            player.module.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in objective.teacher.parameters())
