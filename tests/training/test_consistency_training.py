"""Consistency training against closed forms: its levels, and Gaussian data, whose consistency function is known."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.noise import as_double
from sublimate.diffusion.predictions import Parametrization, Prediction
from sublimate.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow
from sublimate.pipelines.model import open_model
from sublimate.training.losses import pseudo_huber_norm
from sublimate.training.noise_pairs import Continuous, Doubling, level_weights, noise_at, truncated_lognormal
from sublimate.training.objective import Batch, Turn
from sublimate.training.objectives.consistency_training import (
    ConsistencyTraining,
    ConsistencyTrainingConfig,
    same_randomness,
)
from sublimate.training.players import Player, PlayerConfig

VP = DiscreteVP(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0))
SCHEDULES = {"vp": VP, "edm": EDM(), "flow": RectifiedFlow()}
EVERY = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
MEAN, STD = 0.6, 0.5
TURN = Turn("student", ("student",))
PLAIN = {"initialize": "teacher", "dropout": 0.0}
ECT = {"initialize": "teacher", "dropout": 0.0, "huber": 1e-8}


class Exact(nn.Module):
    """f(x, t) = m + (x - m) s/sqrt(s^2 + t^2) for x = x_t/alpha and t = sigma/alpha; `mean` and `std` can train."""

    def __init__(self, schedule, mean=MEAN, std=STD):
        super().__init__()
        self.schedule, self.kind = schedule, Parametrization("sample")
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))

    def forward(self, x_t, t, condition=None, *, features=()):
        c = self.schedule.at(as_double(t))
        x, noise = x_t / c.alpha[:, None], (c.sigma / c.alpha)[:, None]
        x0 = self.mean + (x - self.mean) * self.std / (self.std**2 + noise**2).sqrt()
        return Prediction(x_t, x0, c, self.kind)


def tiny_model(schedule, *layers):
    """A real network that is told the noise level."""
    torch.manual_seed(0)
    network = nn.Sequential(*(layers or (nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))))

    def call(network, x, t, condition, features):
        return network(torch.cat([x, t[:, None].to(x)], 1)), {}

    denoiser = Denoiser(network, call, schedule, Parametrization("edm", 0.5))
    return SimpleNamespace(denoiser=denoiser, latent_shape=(1,), null_condition=Condition)


def oracle_objective(schedule, **options):
    objective = ConsistencyTraining(tiny_model(schedule), ConsistencyTrainingConfig(**PLAIN | options))
    objective.player = Player(Exact(schedule), PlayerConfig(), frozenset({"mean", "std"}))
    objective.player.set_trainable(True)
    return objective


def prepared(objective, n, step=0, seed=0):
    """Quasi-random data and noise, so that small expectations can be seen."""
    points = torch.quasirandom.SobolEngine(3, scramble=True, seed=seed).draw(n, dtype=torch.float64)
    u, z, eps = points.clamp(1e-9, 1 - 1e-9).split(1, 1)
    random = SimpleNamespace(uniform=lambda device: u[:, 0].contiguous(), normal=lambda *_: torch.special.ndtri(eps))
    batch = Batch(Condition(), random, {"images": MEAN + STD * torch.special.ndtri(z)})
    with torch.no_grad():
        return objective.prepare(TURN, batch, step)


def gradient(objective, batch):
    objective.player.module.zero_grad()
    objective.loss(TURN, batch, 0).total.backward()
    return torch.stack([objective.player.module.mean.grad, objective.player.module.std.grad])


def test_the_grid_doubles_eight_times_as_published():
    pairs = Doubling()
    assert [pairs.levels(50_000 * i) for i in range(8)] == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert pairs.levels(49_999) == 11 and pairs.levels(399_999) == pairs.levels(1_000_000) == 1281
    assert [Doubling(first_steps=4, last_steps=4, total_steps=3).levels(k) for k in range(9)] == [5] * 9
    assert [Doubling(first_steps=10, last_steps=50, total_steps=30).levels(k) for k in (0, 10, 20)] == [11, 21, 41]


def test_level_weights_are_the_normal_mass_between_levels():
    grid = EDM().grid(41)[:-1].flip(0)
    weights = level_weights(grid, -1.1, 2.0)
    assert weights.shape == (40,) and float(weights.sum()) == pytest.approx(1, abs=1e-12)
    z = [(math.log(s) + 1.1) / 2.0 for s in grid.tolist()]
    mass = [0.5 * (math.erf(b / 2**0.5) - math.erf(a / 2**0.5)) for a, b in itertools.pairwise(z)]
    expected = torch.tensor(mass, dtype=torch.float64) / sum(mass)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-14)


def test_pairs_are_drawn_with_those_weights_and_each_is_weighted_by_its_step():
    objective = oracle_objective(EDM())
    batch = prepared(objective, 2**16)
    grid = EDM().grid(11)[:-1].flip(0)
    counts = torch.stack([(batch["t"] - high).abs() < 1e-6 * high for high in grid[1:]], 1)
    assert bool((counts.sum(1) == 1).all())
    torch.testing.assert_close(counts.double().mean(0), level_weights(grid, -1.1, 2.0), rtol=0, atol=1e-4)
    lower = torch.cat([torch.zeros(1), grid[1:-1]]).double()
    torch.testing.assert_close(batch["r"], lower[counts.double().argmax(1)], rtol=1e-9, atol=0)
    torch.testing.assert_close(batch["weight"], 1 / (batch["t"] - batch["r"]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("step", [0, 30_000, 60_000, 10_000_000])
def test_ects_lower_level_rises_with_t_and_stays_below_it(step):
    t = torch.logspace(-4, 3, 20_000, dtype=torch.float64)
    pairs = Continuous()
    r = pairs.lower(t, step)
    assert bool((r >= 0).all()) and bool((r < t).all())
    assert bool((r.diff() >= 0).all()) and bool((r > 0).any())
    assert bool((pairs.lower(t, step + 25_000) >= r).all())
    # For much noise the correction is gone, and each stage halves the gap until the ratio stops.
    stage = step // 25_000 + 1
    assert float(r[-1] / t[-1]) == pytest.approx(min(1 - 0.5**stage, 0.999), abs=1e-9)


def test_ects_first_stage_by_hand():
    t = torch.tensor([0.1, 2.0, 10.0], dtype=torch.float64)
    expected = [max(x * (1 - 0.5 * (1 + 8 / (1 + math.exp(x)))), 0) for x in t.tolist()]
    assert expected[0] == 0 < expected[1] < expected[2]
    torch.testing.assert_close(Continuous().lower(t, 0), torch.tensor(expected, dtype=torch.float64))
    assert Continuous(decay=256).lower(t, 0)[2] == pytest.approx(10 * (1 - (1 + 8 / (1 + math.exp(10))) / 256))


def test_the_truncated_lognormal_has_its_quantiles():
    u = torch.linspace(0, 1 - 1e-9, 1001, dtype=torch.float64)
    t = truncated_lognormal(u, -1.1, 2.0, 0.03, 14.6)
    assert float(t[0]) == pytest.approx(0.03) and float(t[-1]) == pytest.approx(14.6, rel=1e-3)
    normal = torch.distributions.Normal(*torch.tensor([-1.1, 2.0], dtype=torch.float64))
    ends = torch.tensor([0.03, 14.6], dtype=torch.float64)
    first, last, here = (normal.cdf(x.log()) for x in (*ends, t))
    torch.testing.assert_close((here - first) / (last - first), u, rtol=0, atol=1e-9)


@EVERY
@pytest.mark.parametrize("options", [{}, ECT | {"pairs": {"kind": "continuous"}}], ids=["ict", "ect"])
def test_levels_stay_within_the_schedule_and_share_their_noise(schedule, options):
    objective = oracle_objective(schedule, **options)
    batch = prepared(objective, 4096)
    low, high = noise_at(schedule, schedule.t_min), min(noise_at(schedule, schedule.t_max), 80.0)
    t, r = ((-0.5 * schedule.log_snr(batch[name])).exp() for name in "tr")
    assert bool((t >= max(low, 0.002) * (1 - 1e-9)).all()) and bool((t <= high * (1 + 1e-9)).all())
    assert bool((r < t).all()) and bool(((r == 0) == (batch["r"] == schedule.t_clean)).all())
    assert bool((batch["t"] >= schedule.t_min).all()) and bool((batch["t"] <= schedule.t_max).all())
    assert 0 < float((r == 0).double().mean()) < 1
    torch.testing.assert_close(batch["weight"], 1 / (t - r), rtol=1e-6, atol=0)


@EVERY
@pytest.mark.parametrize("huber", [100.0, 1.0], ids=["squared", "huber"])
def test_the_exact_function_is_stationary_up_to_the_first_order_of_the_step(schedule, huber):
    """Doubling the levels halves the gradient: the target's bias is of second order, and divided by t - r."""
    sizes = []
    for steps in (40, 80, 160):
        objective = oracle_objective(
            schedule, huber=huber, pairs={"kind": "doubling", "first_steps": steps, "last_steps": steps}
        )
        batch = prepared(objective, 2**13)
        sizes.append(float(gradient(objective, batch).norm()))
    with torch.no_grad():
        objective.player.module.mean += 0.2
        objective.player.module.std += 0.2
    assert sizes[2] < 0.1 * float(gradient(objective, batch).norm())
    assert sizes[1] / sizes[0] == pytest.approx(0.5, abs=0.1)
    assert sizes[2] / sizes[1] == pytest.approx(0.5, abs=0.1)


@EVERY
def test_the_gradient_is_that_of_the_published_loss_with_a_constant_target(schedule):
    """iCT's loss written out in noise levels, x = x0 + t eps, with f's own parameters held fixed in the target."""
    objective = oracle_objective(schedule)
    with torch.no_grad():
        objective.player.module.std += 0.1
    batch = prepared(objective, 512)
    x0, eps = batch["images"], batch["eps"]
    t, r = ((-0.5 * schedule.log_snr(batch[name])).exp()[:, None] for name in "tr")
    mean, std = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (MEAN, STD + 0.1))

    def f(x, noise):
        return mean + (x - mean) * std / (std**2 + noise**2).sqrt()

    target = torch.where(r > 0, f(x0 + r * eps, r), x0).detach()
    c = 0.00054
    losses = (((f(x0 + t * eps, t) - target).square() + c**2).sqrt() - c) / (t - r)
    expected = torch.stack(torch.autograd.grad(losses.mean(), (mean, std)))
    torch.testing.assert_close(gradient(objective, batch), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(objective.loss(TURN, batch, 0).total.double(), losses.mean(), rtol=1e-4, atol=0)


def test_the_norm_counts_all_elements_of_a_sample():
    x, target = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    expected = ((x - target).square().sum((1, 2)) + 0.25).sqrt() - 0.5
    torch.testing.assert_close(pseudo_huber_norm(x, target, 0.5), expected)
    torch.testing.assert_close(pseudo_huber_norm(x, target, 1e-8), (x - target).flatten(1).norm(dim=1))
    x.requires_grad_()
    (at_target,) = torch.autograd.grad(pseudo_huber_norm(x, x.detach(), 1e-8).sum(), x)
    assert torch.equal(at_target, torch.zeros_like(x))
    objective = ConsistencyTraining(
        SimpleNamespace(**vars(tiny_model(EDM())) | {"latent_shape": (3, 32, 32)}), ConsistencyTrainingConfig(**PLAIN)
    )
    assert objective.config.huber * math.sqrt(math.prod(objective.shape)) == pytest.approx(0.0299, abs=1e-4)


@pytest.mark.parametrize(("c", "minimiser"), [(1e3, 0.3), (1e-3, 0.0)], ids=["mean", "median"])
def test_pseudo_huber_goes_from_the_mean_to_the_median(c, minimiser):
    """A target that is 0 with probability .7 and 1 with .3, in float64 by bisection of the gradient."""
    low, high = -0.5, 1.5
    for _ in range(60):
        middle = (low + high) / 2
        pull = sum(p * (middle - x) / math.sqrt((middle - x) ** 2 + c * c) for p, x in ((0.7, 0.0), (0.3, 1.0)))
        low, high = (middle, high) if pull < 0 else (low, middle)
    assert low == pytest.approx(minimiser, abs=2e-3)
    value = torch.tensor([[minimiser]], dtype=torch.float32)
    near = [
        sum(p * float(pseudo_huber_norm(value + d, torch.full((1, 1), x), c)) for p, x in ((0.7, 0.0), (0.3, 1.0)))
        for d in (-0.1, 0.0, 0.1)
    ]
    assert near[1] == min(near)


def test_both_evaluations_draw_the_same_dropout_masks():
    model = tiny_model(EDM(), nn.Linear(2, 64), nn.Dropout(0.1), nn.SiLU(), nn.Linear(64, 1))
    objective = ConsistencyTraining(model, ConsistencyTrainingConfig(initialize="teacher", dropout=0.5))
    student, seen = objective.student.train(), []
    assert student.network[1].p == 0.5 and model.denoiser.network[1].p == 0.1
    student.network[1].register_forward_hook(lambda layer, inputs, output: seen.append(output == 0))
    batch = prepared(objective, 64)
    batch = batch.adding(images=batch["images"].float(), eps=batch["eps"].float())
    objective.loss(TURN, batch, 0)
    objective.loss(TURN, batch, 0)
    target, online, _, later = seen
    assert torch.equal(target, online) and 0.4 < float(online.double().mean()) < 0.6
    assert not torch.equal(online, later)
    # The same input twice then has no loss at all.
    same = batch.adding(t=batch["t"].clamp_min(1.0))
    assert float(objective.loss(TURN, same.adding(r=same["t"]), 0).total.detach()) == 0


def test_shared_randomness_is_what_the_generator_would_have_given():
    torch.manual_seed(5)
    with same_randomness(torch.device("cpu")):
        first = torch.rand(3)
    assert torch.equal(first, torch.rand(3))
    assert not torch.equal(first, torch.rand(3))


@pytest.mark.slow
def test_random_weights_are_fresh_and_the_model_keeps_its_own(request):
    model = open_model(str(request.getfixturevalue("tiny_sd_v")))
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    torch.manual_seed(0)
    fresh = ConsistencyTraining(model, ConsistencyTrainingConfig()).student
    torch.manual_seed(0)
    again = ConsistencyTraining(model, ConsistencyTrainingConfig()).student
    tuned = ConsistencyTraining(model, ConsistencyTrainingConfig(initialize="teacher")).student
    assert type(fresh.network) is type(model.denoiser.network)
    for name, value in model.denoiser.state_dict().items():
        assert torch.equal(value, before[name]) and torch.equal(value, tuned.state_dict()[name])
        assert torch.equal(fresh.state_dict()[name], again.state_dict()[name])
        if value.ndim > 1:
            assert not torch.equal(value, fresh.state_dict()[name])
    rates = {layer.p for layer in fresh.modules() if isinstance(layer, nn.Dropout)}
    assert rates == {0.3}
    assert {layer.p for layer in model.denoiser.modules() if isinstance(layer, nn.Dropout)} == {0.0}


def test_what_does_not_fit_is_refused():
    model = tiny_model(EDM())
    with pytest.raises(ValueError, match="no dropout layers"):
        ConsistencyTraining(model, ConsistencyTrainingConfig())
    with pytest.raises(ValueError, match="cannot carry a LoRA"):
        ConsistencyTraining(model, ConsistencyTrainingConfig(student=PlayerConfig(kind="lora")))
    with pytest.raises(ValueError, match="a positive level to a higher one"):
        ConsistencyTrainingConfig(noise_range=(2.0, 1.0))
    with pytest.raises(ValueError, match="nothing of this schedule's levels"):
        ConsistencyTraining(model, ConsistencyTrainingConfig(**PLAIN, noise_range=(90.0, 100.0)))
    own = nn.Module()
    own.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="cannot draw fresh weights"):
        ConsistencyTraining(tiny_model(EDM(), own), ConsistencyTrainingConfig(dropout=0.0))


def test_the_student_starts_at_the_noisiest_level_it_was_trained_at():
    def start(schedule, **options):
        artefact = oracle_objective(schedule, **options).exports()
        return artefact.start_time, artefact.few_steps

    assert start(EDM()) == (80.0, None)
    assert start(VP) == (999.0, None)
    assert start(RectifiedFlow())[0] == pytest.approx(80 / 81)
    few = start(VP, sampling_steps=4)[1]
    assert few.call_times(VP) == (999.0, 749.0, 499.0, 249.0)
    # Where that is below the grid's second time, the others are of a finer grid.
    few = start(VP, sampling_steps=4, noise_range=(0.002, 2.5))[1]
    first, *rest = few.call_times(VP)
    assert first < 749 and rest == [599.0, 399.0, 199.0]
    few = start(RectifiedFlow(), sampling_steps=2)[1]
    assert few.call_times(RectifiedFlow()) == pytest.approx((80 / 81, 0.5))


def test_the_students_later_calls_are_at_the_noise_levels_that_are_asked_for():
    levels = (1.6, 0.8, 0.45)
    for schedule in (VP, RectifiedFlow(), EDM()):
        few = oracle_objective(schedule, sampling_steps=4, sampling_noise=levels).exports().few_steps
        first, *rest = few.call_times(schedule)
        assert first == oracle_objective(schedule).exports().start_time
        # A table's times are whole, so its levels are the nearest ones.
        assert [noise_at(schedule, t) for t in rest] == pytest.approx(levels, rel=1e-2 if schedule is VP else 1e-6)
    with pytest.raises(ValueError, match="4 steps have 3, not 2"):
        ConsistencyTrainingConfig(sampling_steps=4, sampling_noise=(1.6, 0.8))
    for unordered in ((0.8, 1.6), (1.6, 0.001), (1.6, -1.0)):
        with pytest.raises(ValueError, match="descends and stays above noise_range"):
            ConsistencyTrainingConfig(sampling_steps=3, sampling_noise=unordered)
    with pytest.raises(ValueError, match=r"ends at 0\.0021, below the schedule's .*: raise it"):
        oracle_objective(VP, sampling_steps=2, sampling_noise=(0.0021,))
    with pytest.raises(ValueError, match="descends and stays above"):
        ConsistencyTrainingConfig(sampling_steps=2, sampling_noise=(math.nan,))
    with pytest.raises(ValueError, match="lower it"):
        oracle_objective(VP, sampling_steps=2, sampling_noise=(1000.0,))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"initialize": "random", "huber": 0.03, "pairs": {"first_steps": 10, "last_steps": 160, "total_steps": 1500}},
        {"huber": 0.03, "pairs": {"kind": "continuous", "decay": 2.0, "steps_per_stage": 250, "largest_ratio": 0.98}},
    ],
    ids=["ict", "ect"],
)
def test_a_short_run_from_random_weights_reaches_the_known_function(options):
    schedule = EDM(sigma_max=5.0)
    if "kind" not in options["pairs"]:
        options = {**options, "pairs": {"kind": "doubling", **options["pairs"]}}
    objective = ConsistencyTraining(tiny_model(schedule), ConsistencyTrainingConfig(**PLAIN | options))
    objective.player.set_trainable(True)
    optimizer = torch.optim.Adam(objective.student.parameters(), lr=3e-3, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for step in range(1500):
        generator = torch.Generator().manual_seed(step)
        wide = SimpleNamespace(
            uniform=lambda device, g=generator: torch.rand(256, generator=g, dtype=torch.float64),
            normal=lambda *_, g=generator: torch.randn(256, 1, generator=g),
        )
        images = MEAN + STD * torch.randn(256, 1, generator=generator)
        batch = objective.prepare(TURN, Batch(Condition(), wide, {"images": images}), step)
        optimizer.zero_grad()
        objective.loss(TURN, batch, step).total.backward()
        nn.utils.clip_grad_norm_(objective.student.parameters(), 10.0)
        optimizer.step()
        decay.step()
    for noise in (0.1, 0.5, 2.0, 5.0):
        t = torch.full((64,), noise, dtype=torch.float64)
        spread = math.sqrt(STD**2 + noise**2)
        x = MEAN + spread * torch.linspace(-2, 2, 64)[:, None]
        with torch.no_grad():
            error = (objective.student(x, t).x0 - Exact(schedule)(x.double(), t).x0).abs()
        assert float(error.mean()) < 0.06, (noise, float(error.mean()))


def test_phases_of_doublings_are_where_the_grid_grows():
    pairs = Doubling(first_steps=10, last_steps=60, total_steps=100)
    phases = pairs.phases()
    assert phases[0] == 0 and pairs.levels(phases[-1]) == 61 > pairs.levels(phases[-1] - 1)
    assert all(pairs.levels(step) > pairs.levels(step - 1) for step in phases[1:])
    assert ConsistencyTrainingConfig().phases()[-1] == 7 * (400_000 // 8)
