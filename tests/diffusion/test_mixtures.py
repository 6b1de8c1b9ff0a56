"""Gaussian mixtures against autograd, sampling and quadrature."""

import math

import pytest
import torch

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from sublimate.diffusion.predictions import KINDS, Parametrization
from sublimate.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow, TrigFlow

TABLE = torch.cumprod(1 - torch.linspace(0.01, 0.2, 20, dtype=torch.float64), 0)
SCHEDULES = {"discrete": DiscreteVP(TABLE), "edm": EDM(), "flow": RectifiedFlow(), "trig": TrigFlow(0.5)}
LINE = torch.linspace(-8, 8, 4001, dtype=torch.float64)


def line():
    """A mixture on the line."""
    return GaussianMixture(torch.tensor([0.3, 0.7]), torch.tensor([[-1.5], [1.0]]), torch.tensor([0.4, 0.5])).double()


def plane():
    means = torch.tensor([[-1.0, 0.5], [2.0, 0.0], [0.0, -2.0]])
    return GaussianMixture(torch.tensor([1.0, 2.0, 1.0]), means, torch.tensor([0.3, 0.6, 1.0])).double()


def points(n, d):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_density_is_that_of_torch():
    mixture = plane()
    components = torch.distributions.Independent(
        torch.distributions.Normal(mixture.means, mixture.stds[:, None].expand(3, 2)), 1
    )
    reference = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(mixture.weights), components)
    torch.testing.assert_close(mixture.log_prob(points(7, 2)), reference.log_prob(points(7, 2)))
    assert float(torch.trapezoid(line().log_prob(LINE[:, None]).exp(), LINE)) == pytest.approx(1)


@pytest.mark.parametrize("make", [line, plane])
def test_score_is_the_gradient_of_the_log_density(make):
    mixture = make()
    x = points(7, mixture.means.shape[-1]).requires_grad_(True)
    (gradient,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    torch.testing.assert_close(mixture.score(x), gradient)


def test_samples_have_the_mixtures_moments():
    mixture, n = plane(), 40_000
    x, k = mixture.sample_labelled(n, torch.Generator().manual_seed(0))
    mean = mixture.weights @ mixture.means
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=4 * 1.4 / math.sqrt(n))
    share = torch.bincount(k).double() / n
    torch.testing.assert_close(share, mixture.weights, rtol=0, atol=4 * 0.5 / math.sqrt(n))
    for i in range(3):
        torch.testing.assert_close(x[k == i].std(0), mixture.stds[i].expand(2), rtol=0.05, atol=0)
    assert torch.equal(
        mixture.sample(5, torch.Generator().manual_seed(1)), mixture.sample(5, torch.Generator().manual_seed(1))
    )


def test_marginal_is_the_law_of_the_noised_data():
    mixture, alpha, sigma, n = plane(), 0.8, 0.6, 40_000
    generator = torch.Generator().manual_seed(0)
    x_t = alpha * mixture.sample(n, generator)
    x_t = x_t + sigma * torch.randn(n, 2, dtype=torch.float64, generator=generator)
    noised = mixture.marginal(alpha, sigma)
    mean = noised.weights @ noised.means
    second = noised.weights @ (noised.means.square() + noised.stds.square()[:, None])
    torch.testing.assert_close(x_t.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(x_t.square().mean(0), second, rtol=0.03, atol=0)


def test_marginal_density_is_the_convolution():
    mixture, alpha, sigma = line(), 0.8, 0.6
    x_t = torch.tensor([-2.0, 0.1, 1.3], dtype=torch.float64)
    kernel = torch.distributions.Normal(alpha * LINE, sigma).log_prob(x_t[:, None]).exp()
    expected = torch.trapezoid(mixture.log_prob(LINE[:, None]).exp() * kernel, LINE)
    torch.testing.assert_close(mixture.marginal(alpha, sigma).log_prob(x_t[:, None]).exp(), expected)


def test_one_marginal_per_sample():
    mixture, x = plane(), points(2, 2)
    alpha, sigma = torch.tensor([0.9, 0.2]), torch.tensor([0.1, 0.8])
    together = mixture.marginal(alpha, sigma)
    for quantity in ("log_prob", "score"):
        alone = [getattr(mixture.marginal(alpha[i], sigma[i]), quantity)(x[i : i + 1])[0] for i in range(2)]
        torch.testing.assert_close(getattr(together, quantity)(x), torch.stack(alone))
    twice = together.marginal(0.5, 0.3)
    torch.testing.assert_close(
        twice.log_prob(x), mixture.marginal(0.5 * alpha, (0.25 * sigma**2 + 0.09).sqrt()).log_prob(x)
    )
    torch.testing.assert_close(
        mixture.marginal(1.0, sigma).log_prob(x), mixture.marginal(torch.ones(2), sigma).log_prob(x)
    )


def test_gradients_reach_what_the_mixture_was_made_from():
    mean = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    mixture = GaussianMixture(torch.ones(1), mean, torch.ones(1, dtype=torch.float64))
    mixture.log_prob(torch.zeros(1, 1, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(mean.grad, torch.tensor([[-0.5]], dtype=torch.float64))


def posterior_mean(density, x_t, alpha, sigma):
    """E[x0 | x_t] by quadrature."""
    joint = density * torch.distributions.Normal(alpha * LINE, sigma).log_prob(x_t[:, None]).exp()
    return torch.trapezoid(joint * LINE, LINE) / torch.trapezoid(joint, LINE)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_denoiser_is_the_posterior_mean(schedule):
    mixture = line()
    x_t = torch.tensor([-2.0, 0.1, 1.3], dtype=torch.float64)
    t = schedule.t_at_log_snr(torch.tensor([-1.0, 0.5, 2.0]))
    c = schedule.at(t)
    expected = posterior_mean(mixture.log_prob(LINE[:, None]).exp(), x_t, c.alpha[:, None], c.sigma[:, None])
    prediction = MixtureDenoiser(mixture, schedule)(x_t[:, None], t)
    torch.testing.assert_close(prediction.x0[:, 0], expected)
    torch.testing.assert_close(prediction.score, mixture.marginal(c.alpha, c.sigma).score(x_t[:, None]))


def test_labels_choose_a_class_and_the_last_is_the_null():
    mixture = GaussianMixture(
        torch.tensor([0.2, 0.3, 0.5]), torch.tensor([[-2.0], [0.0], [1.5]]), torch.tensor([0.4, 0.3, 0.5])
    ).double()
    denoiser = MixtureDenoiser(mixture, RectifiedFlow(), labels=torch.tensor([0, 1, 0]))
    x_t = torch.tensor([0.4, 0.4, 0.4, 0.4], dtype=torch.float64)
    condition = Condition(text=torch.tensor([0, 1, 2, 0]))
    found = denoiser(x_t[:, None], 0.6, condition).x0[:, 0]
    parts = (mixture.log_components(LINE[:, None])).exp()
    densities = [parts[:, [0, 2]].sum(1), parts[:, 1], parts.sum(1), parts[:, [0, 2]].sum(1)]
    expected = torch.cat([posterior_mean(d, x_t[:1], 0.4, 0.6) for d in densities])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(denoiser(x_t[:1, None], 0.6).x0[:, 0], expected[2:3])
    one = Condition(text=torch.tensor([1]))
    torch.testing.assert_close(denoiser(x_t[:, None], 0.6, one).x0[:, 0], expected[1].expand(4))
    null = Condition(text=torch.tensor([2]))
    steered = guided(denoiser, x_t[:1, None], 0.6, one, null, 3.0).x0[:, 0]
    torch.testing.assert_close(steered, expected[2:3] + 3 * (expected[1:2] - expected[2:3]))


@pytest.mark.parametrize("kind", KINDS)
def test_any_parametrization_of_the_same_denoiser(kind):
    schedule = EDM()
    x_t = points(4, 2)
    reference = MixtureDenoiser(plane(), schedule)(x_t, 0.7)
    found = MixtureDenoiser(plane(), schedule, parametrization=Parametrization(kind, 0.5))(x_t, 0.7)
    assert found.parametrization.kind == kind
    torch.testing.assert_close(found.x0, reference.x0)
    torch.testing.assert_close(found.eps, reference.eps)


def test_images_are_flattened():
    means = points(2, 12)
    denoiser = MixtureDenoiser(GaussianMixture(torch.ones(2), means, torch.ones(2)), EDM())
    x = points(5, 12)
    image = denoiser(x.reshape(5, 3, 2, 2), 1.0)
    assert image.x0.shape == (5, 3, 2, 2)
    torch.testing.assert_close(image.x0.flatten(1), denoiser(x, 1.0).x0)
    assert denoiser(x.float(), 1.0).x0.dtype == torch.float32


def test_features_are_refused():
    with pytest.raises(ValueError, match="no features"):
        MixtureDenoiser(line(), EDM())(torch.zeros(1, 1), 1.0, features=("mid",))


@pytest.mark.parametrize(
    "shapes", [((2,), (2,), (2,)), ((2,), (3, 1), (3,)), ((2,), (2, 1), (3,)), ((2, 1), (2, 1), (2,))]
)
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="weights"):
        GaussianMixture(*(torch.ones(shape) for shape in shapes))
