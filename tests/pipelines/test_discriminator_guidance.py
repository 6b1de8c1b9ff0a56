"""Discriminator guidance against exact ratios of Gaussian mixtures, and its special cases."""

import math

import pytest
import torch
from torch import nn

from sublimate.diffusion import samplers
from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from sublimate.diffusion.schedules import EDM, RectifiedFlow, TrigFlow
from sublimate.pipelines.discriminator_guidance import DiscriminatorGuidance

NOTHING = Condition()


def mixture(means, std):
    count = len(means)
    return GaussianMixture(
        torch.full((count,), 1 / count).double(),
        torch.tensor(means).double()[:, None],
        torch.full((count,), std).double(),
    )


MODEL, DATA = mixture([-1.0, 1.4], 0.5), mixture([-1.3, 1.0], 0.4)


class Blind(MixtureDenoiser):
    """The model's exact denoiser; its features are its input."""

    def forward(self, x_t, t, condition=None, *, features=()):
        return super().forward(x_t, t, condition)


class ExactRatio(nn.Module):
    """log p_t/q_t of the data over the model, times a factor."""

    taps = ()

    def __init__(self, schedule, factor=1.0):
        super().__init__()
        self.schedule, self.factor = schedule, factor

    def forward(self, prediction, t):
        c = self.schedule.at(t)
        p, q = (m.marginal(c.alpha, c.sigma) for m in (DATA, MODEL))
        return self.factor * (p.log_prob(prediction.x_t) - q.log_prob(prediction.x_t))[:, None]


def guidance(schedule, factor=1.0, **options):
    options = {"log_snr_max": math.inf, "corrector_weight": 1.0, **options}
    return DiscriminatorGuidance(Blind(MODEL, schedule), ExactRatio(schedule, factor), **options)


def noise(count=64):
    return torch.randn(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def no_noise(x):
    raise AssertionError("only boosting draws noise")


def plain(denoiser):
    return lambda x, t: denoiser(x, t)


@pytest.mark.parametrize("schedule", [EDM(0.02, 20.0), TrigFlow(1.0), RectifiedFlow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("sampler", ["heun", "ddim"])
def test_the_exact_ratio_turns_the_models_score_into_the_datas(schedule, sampler):
    guided = guidance(schedule)
    # Flows begin at pure noise, of which no ratio says what to correct.
    grid = schedule.grid(12) if isinstance(schedule, EDM) else schedule.grid(12)[1:]
    found = guided.sample(plain(guided.denoiser), noise(), NOTHING, grid, no_noise, sampler=sampler)
    walk = {"heun": samplers.heun, "ddim": samplers.ddim}[sampler]
    exact = MixtureDenoiser(DATA, schedule)
    expected = walk(plain(exact), schedule.start_scale(float(grid[0])) * noise(), schedule, grid)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("noisiest", "uncorrected"), [(-math.inf, 1), (-4.0, 2)])
def test_pure_noise_and_levels_beyond_those_it_knows_are_not_corrected(noisiest, uncorrected):
    schedule = RectifiedFlow()
    guided, grid = guidance(schedule, log_snr_min=noisiest), schedule.grid(12)
    assert -5 < float(schedule.log_snr(grid[1])) < -4 < float(schedule.log_snr(grid[2]))
    found = guided.sample(plain(guided.denoiser), noise(), NOTHING, grid, no_noise, sampler="ddim")
    x = samplers.ddim(plain(guided.denoiser), noise(), schedule, grid[: uncorrected + 1])
    expected = samplers.ddim(plain(MixtureDenoiser(DATA, schedule)), x, schedule, grid[uncorrected:])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_samples_at_levels_of_their_own_are_corrected_by_themselves():
    schedule, x = RectifiedFlow(), noise(3)
    guided, t = guidance(schedule), torch.tensor([1.0, 0.5, 0.9], dtype=torch.float64)
    prediction = guided.denoiser(x, t)
    found = guided.corrected(prediction, t, NOTHING, 1.0)[0].x0
    expected = MixtureDenoiser(DATA, schedule)(x, t).x0
    assert torch.equal(found[0], prediction.x0[0])
    torch.testing.assert_close(found[1:], expected[1:])


def test_a_discriminator_that_knows_nothing_changes_nothing():
    schedule = EDM(0.02, 20.0)
    guided = guidance(schedule, factor=0.0)
    grid = schedule.grid(6)
    found = guided.sample(plain(guided.denoiser), noise(), NOTHING, grid, no_noise)
    expected = samplers.heun(plain(guided.denoiser), schedule.start_scale(float(grid[0])) * noise(), schedule, grid)
    assert torch.equal(found, expected)


def test_predictor_and_corrector_have_weights_of_their_own():
    schedule = EDM(0.02, 20.0)
    grid = schedule.grid(4)

    def drawn(**weights):
        guided = guidance(schedule, **weights)
        return guided.sample(plain(guided.denoiser), noise(), NOTHING, grid, no_noise)

    first, both = drawn(corrector_weight=0.0), drawn(corrector_weight=1.0)
    last = drawn(predictor_weight=0.0)
    assert all((a - b).abs().max() > 1e-3 for a, b in ((first, both), (first, last), (last, both)))

    # One step by hand: the corrected derivative at its start, the plain one at its end.
    guided, (t, to) = guidance(schedule, corrector_weight=0.0), (3.0, 1.0)
    x = 3 * noise()
    d = -t * DATA.marginal(1.0, t).score(x)
    proposal = x + (to - t) * d
    d_to = -to * MODEL.marginal(1.0, to).score(proposal)
    expected = x + (to - t) * (d + d_to) / 2
    times = torch.full((64,), t, dtype=torch.float64)

    def predict(x, t):
        return guided.corrected(guided.denoiser(x, t), t, NOTHING, 1.0)[0]

    found = samplers.heun_step(predict, plain(guided.denoiser), x, schedule, times, to)
    # The correction is float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_clean_levels_are_left_alone():
    schedule = EDM(0.02, 20.0)
    guided = guidance(schedule, log_snr_max=0.0)
    t = torch.tensor([0.5, 2.0], dtype=torch.float64)
    before = guided.denoiser(noise(2), t)
    after, ratio = guided.corrected(before, t, NOTHING, 1.0)
    assert torch.equal(after.eps[0], before.eps[0])
    assert not torch.equal(after.eps[1], before.eps[1])
    assert guided.corrected(before, t, NOTHING, 0.0) == (before, None)
    assert ratio is not None


def test_boosting_doubles_the_correction_of_what_looks_fake():
    schedule = EDM(0.02, 20.0)
    guided, x = guidance(schedule), noise()
    t = torch.full((64,), 1.0, dtype=torch.float64)
    before = guided.denoiser(x, t)
    once, ratio = guided.corrected(before, t, NOTHING, 1.0)
    twice, _ = guided.corrected(before, t, NOTHING, 1.0, doubled=True)
    factor = torch.where(ratio < 0, 2.0, 1.0)[:, None]
    assert 0 < int((ratio < 0).sum()) < 64
    torch.testing.assert_close(twice.eps - before.eps, factor * (once.eps - before.eps), rtol=1e-5, atol=1e-9)


def test_boosting_adds_noise_to_what_looks_fake_every_fifth_step():
    schedule = EDM(0.02, 20.0)
    guided = guidance(schedule, boosting=True)
    drawn = []

    def fresh(x):
        drawn.append(len(x))
        return torch.ones_like(x)

    guided.sample(plain(guided.denoiser), noise(), NOTHING, schedule.grid(11), fresh)
    assert drawn == [64, 64]  # at steps 5 and 10
    rows = torch.arange(64) < 10
    t = torch.full((64,), 2.0, dtype=torch.float64)
    x, t_hat = guided._churned(noise(), t, rows, 11, torch.ones_like)
    assert t_hat.tolist() == pytest.approx([2 * (1 + 4 / 11)] * 10 + [2.0] * 54)
    expected = noise() + (t_hat**2 - t**2).sqrt()[:, None]
    torch.testing.assert_close(x, expected)


def test_the_discriminators_probability_is_clipped():
    schedule = EDM(0.02, 20.0)
    ratio, gradient = guidance(schedule, factor=1e6).correction(noise(), torch.ones(64).double(), NOTHING)
    assert ratio.abs().max() == pytest.approx(math.log((1 - 1e-5) / 1e-5))
    assert not gradient.any()
