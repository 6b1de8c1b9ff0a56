"""Target-driven distillation: its targets against a loop over samples, its loss against consistency distillation."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from sublimate.diffusion.predictions import Parametrization
from sublimate.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow
from sublimate.training.consistency import GuidedSolver
from sublimate.training.objective import Batch, Turn
from sublimate.training.objectives.consistency_distillation import (
    ConsistencyDistillation,
    ConsistencyDistillationConfig,
)
from sublimate.training.objectives.target_driven import (
    TargetDriven,
    TargetDrivenConfig,
    choose_targets,
    lowered,
    merged_targets,
    target_window,
)
from sublimate.training.players import Player, PlayerConfig
from sublimate.training.randomness import SampleRandom

VP = DiscreteVP(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0))
SCHEDULES = {"vp": VP, "edm": EDM(sigma_max=20.0), "flow": RectifiedFlow()}
EVERY = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
TWO = GaussianMixture(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.tensor([0.4, 0.3])).double()
FULL = PlayerConfig(kind="full")
TURN = Turn("student", ("student",))


def tiny_model(schedule, null=None):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 1)).double()
    denoiser = Denoiser(network, lambda n, x, t, c, f: (n(x), {}), schedule, Parametrization("v_prediction"))
    return SimpleNamespace(denoiser=denoiser, latent_shape=(1,), null_condition=lambda: null or Condition())


def objective_of(schedule, null=None, teacher=None, **options):
    options = {"student": FULL, "guidance_scale": 4.5 if null else 1.0, **options}
    objective = TargetDriven(tiny_model(schedule, null), TargetDrivenConfig(**options))
    if teacher is not None:
        model = SimpleNamespace(denoiser=teacher, null_condition=lambda: null or Condition())
        objective.solver = GuidedSolver(model, objective.config.grid_steps)
    return objective


def batch_of(n, condition=None, seed=0):
    images = torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Batch(condition or Condition(), SampleRandom(seed, 0, "student", range(n)), {"images": images})


def prepared(objective, batch):
    with torch.no_grad():
        batch = objective.prepare(TURN, batch, 0)
    return batch.adding(eps=batch["eps"].double())


def times_of_samplers(grid_steps, fewest, most):
    """The merged times by the published recipe, on a table of 1000 times: 0 stands for clean data."""
    grid = (np.arange(1, grid_steps + 1) * (1000 // grid_steps) - 1)[::-1]
    times = set()
    for k in range(fewest, most + 1):
        times |= set(grid[np.floor(np.linspace(0, grid_steps, k, endpoint=False)).astype(int)].tolist())
    return sorted((times | {0}) - {max(times)})


@pytest.mark.parametrize(("grid_steps", "fewest", "most"), [(250, 4, 8), (250, 1, 4), (50, 2, 6), (100, 5, 5)])
def test_targets_are_those_of_a_loop_over_samples(grid_steps, fewest, most):
    merged = times_of_samplers(grid_steps, fewest, most)
    targets = merged_targets(grid_steps, (fewest, most))
    grid = VP.grid(grid_steps)
    assert sorted(grid[targets].clamp_min(0).tolist()) == merged

    skip = 1000 // grid_steps
    window = target_window(grid_steps, fewest)
    if (grid_steps, fewest) == (250, 4):
        assert window * skip == 260
    position = torch.arange(1, grid_steps + 1)
    choices = torch.linspace(0, 1 - 1e-9, 60, dtype=torch.float64)
    for where in position.tolist():
        s = max(int(grid[where]), 0)
        nearest = max(m for m in merged if m <= s)
        expected = {m for m in merged if max(nearest - window * skip, 0) <= m <= nearest}
        chosen = choose_targets(targets, torch.full((60,), where), window, choices)
        assert {max(int(t), 0) for t in grid[targets[chosen]]} == expected
        counts = chosen.unique(return_counts=True)[1]
        assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize("grid_steps", [7, 30, 250])
@pytest.mark.parametrize("fewest", [1, 2, 3, 4])
def test_every_sampler_finds_its_next_time_among_the_choices(grid_steps, fewest):
    """From just behind one call of K steps, the next call of the same K is a choice, for every K."""
    targets, window = merged_targets(grid_steps, (fewest, 7)), target_window(grid_steps, fewest)
    for k in range(fewest, 8):
        calls = [i * grid_steps // k for i in range(k)] + [grid_steps]
        for position, end in itertools.pairwise(calls):
            start, choice = torch.full((500,), position + 1), torch.linspace(0, 1 - 1e-9, 500, dtype=torch.float64)
            chosen = targets[choose_targets(targets, start, window, choice)]
            assert end in chosen.tolist()
            assert bool((chosen > position).all())


def test_lowered_targets_are_whole_on_a_table_and_clean_stays_clean():
    t = torch.tensor([999.0, 251.0, 3.0, -1.0], dtype=torch.float64)
    assert torch.equal(lowered(VP, t, torch.zeros(4)), t)
    assert lowered(VP, t, torch.full((4,), 0.3)).tolist() == [699, 175, 2, -1]
    assert lowered(VP, t, torch.ones(4)).tolist() == [-1] * 4
    t = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(lowered(RectifiedFlow(), t, torch.full((3,), 0.2)), t * 0.8)


@pytest.mark.slow
@EVERY
def test_targets_lie_at_or_below_where_the_teacher_steps_to(schedule):
    objective = objective_of(schedule, eta=0.3)
    batch = prepared(objective, batch_of(2000))
    assert bool((batch["s"] < batch["t"]).all())
    assert bool((batch["target"] <= batch["s"]).all())
    assert bool((batch["target"] >= schedule.t_clean).all())
    assert len(batch["target"].unique()) > 100
    plain = prepared(objective_of(schedule, eta=0.0), batch_of(2000))["target"]
    assert len(plain.unique()) == len(objective.targets)
    shares = (batch["target"] / plain)[plain > schedule.t_clean]
    assert 0.69 < float(shares.min()) < 0.72
    assert 0.98 < float(shares.max()) <= 1


@EVERY
@pytest.mark.parametrize("seed", range(2))
def test_one_target_at_clean_data_is_consistency_distillation(schedule, seed):
    target = objective_of(schedule, target_steps=(1, 1), eta=0.0, grid_steps=50)
    plain = {"guidance_input": False, "guidance_range": None, "guidance_scale": 1.0, "target_decay": None}
    consistency = ConsistencyDistillation(tiny_model(schedule), ConsistencyDistillationConfig(**plain, student=FULL))
    with torch.no_grad():
        for a, b in zip(target.player.module.parameters(), consistency.player.module.parameters(), strict=True):
            b.copy_(a.add_(0.3))
    batch = prepared(target, batch_of(64, seed=seed))
    assert set(batch["target"].tolist()) == {schedule.t_clean}
    found = []
    for objective in (target, consistency):
        objective.player.set_trainable(True)
        total = objective.loss(TURN, batch, 0).total
        total.backward()
        found.append([total, *(p.grad for p in objective.player.module.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@EVERY
def test_on_straight_trajectories_the_teacher_is_consistent_for_every_target(schedule):
    """With one clean point x0 and eps are the same all along, so every jump of the teacher itself is right."""
    point = GaussianMixture(torch.ones(1), torch.full((1, 1), 0.4), torch.zeros(1)).double()
    exact = MixtureDenoiser(point, schedule)
    objective = objective_of(schedule, teacher=exact)
    objective.player = Player(AsPlayer(exact), PlayerConfig(), frozenset({"shift"}))
    batch = prepared(objective, batch_of(1000))
    batch = batch.adding(images=torch.full_like(batch["images"], 0.4))
    assert float(objective.loss(TURN, batch, 0).total.detach()) < 1e-9
    with torch.no_grad():
        objective.player.module.shift += 0.1
    assert float(objective.loss(TURN, batch, 0).total.detach()) > 1e-4


class AsPlayer(nn.Module):
    """A denoiser whose x0 is off by a trainable shift."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.shift = denoiser, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_t, t, condition=None, *, features=()):
        exact = self.denoiser(x_t, t, condition)
        return type(exact)(x_t, exact.x0 + self.shift, exact.coefficients, Parametrization("sample"))


@EVERY
def test_no_gradient_flows_through_the_target(schedule):
    exact = MixtureDenoiser(TWO, schedule)
    objective = objective_of(schedule, teacher=exact, huber_c=0.1)
    objective.player = Player(AsPlayer(exact), PlayerConfig(), frozenset({"shift"}))
    objective.player.set_trainable(True)
    batch = prepared(objective, batch_of(256))
    total = objective.loss(TURN, batch, 0).total
    (found,) = torch.autograd.grad(total, [objective.player.module.shift])

    # d x_tau / d shift = alpha_tau - sigma_tau alpha_t / sigma_t, of the student's jump alone.
    t, s, target = batch["t"], batch["s"], batch["target"]
    at, to = schedule.at(t), schedule.at(target)
    slope = (to.alpha - to.sigma * at.alpha / at.sigma)[:, None]
    x_t = at.alpha[:, None] * batch["images"] + at.sigma[:, None] * batch["eps"]

    def moved(x, time):
        c, prediction = schedule.at(time), exact(x, time.clamp_min(schedule.t_min))
        x0 = prediction.x0
        eps = (x - c.alpha[:, None] * x0) / c.sigma[:, None]
        return torch.where((time <= schedule.t_clean)[:, None], x, to.alpha[:, None] * x0 + to.sigma[:, None] * eps)

    teacher, c = exact(x_t, t), schedule.at(s)
    x_s = c.alpha[:, None] * teacher.x0 + c.sigma[:, None] * teacher.eps
    difference = moved(x_t, t) - moved(x_s, s)
    expected = (slope * difference / (difference.square() + 0.01).sqrt()).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
    loss = ((difference.square() + 0.01).sqrt() - 0.1).mean()
    torch.testing.assert_close(total.double(), loss, rtol=1e-4, atol=1e-9)


class Watched(MixtureDenoiser):
    """Keeps what it is told."""

    def forward(self, x_t, t, condition=None, *, features=()):
        self.__dict__.setdefault("seen", []).append(condition)
        return super().forward(x_t, t, condition, features=features)


def test_samples_without_text_are_not_guided():
    """Condition and null are one there, whatever the scale; the student is told the same."""
    null = Condition(text=torch.tensor([2]))
    teacher = Watched(TWO, VP)
    condition = Condition(text=torch.tensor([0, 1] * 200))
    losses = []
    for scale in (1.5, 8.0):
        objective = objective_of(VP, null, teacher, empty_prompts=1.0, guidance_scale=scale)
        losses.append(objective.loss(TURN, prepared(objective, batch_of(400, condition)), 0).total)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    assert set(torch.cat([seen["text"] for seen in teacher.seen]).tolist()) == {2}

    objective = objective_of(VP, null, teacher)
    batch = prepared(objective, batch_of(400, condition))
    assert 0.1 < float(batch["empty"].double().mean()) < 0.3
    teacher.seen.clear()
    objective.loss(TURN, batch, 0)
    guiding, asked = teacher.seen[0]["text"].split(400)
    assert set(guiding.tolist()) == {2}
    assert torch.equal(asked, torch.where(batch["empty"], 2, condition["text"]))


def test_the_published_sampling_is_the_default():
    objective = objective_of(VP, Condition(text=torch.tensor([2])))
    few = objective.few_steps
    assert (few.sampler, few.steps, few.eta, few.guidance_scale) == ("target_driven", 4, 0.2, 1.7)
    assert few.call_times(VP) == (999, 751, 499, 251)
    assert objective.solver.grid.tolist() == [*map(float, range(999, 0, -4)), -1.0]
    assert objective_of(VP).few_steps.guidance_scale == 1
    teacher = tiny_model(VP, Condition(text=torch.tensor([2])))
    teacher.denoiser.reads_guidance = True  # it was told none in training
    assert TargetDriven(teacher, TargetDrivenConfig(student=FULL)).few_steps.guidance_scale == 1
    uneven = objective_of(VP, sampling_times=(999, 875, 751, 499, 251)).few_steps
    assert (uneven.steps, uneven.call_times(VP)) == (5, (999, 875, 751, 499, 251))
    assert uneven.targets(VP) == (700, 600, 399, 200, -1)


def test_options_that_make_no_targets_are_refused():
    with pytest.raises(ValueError, match="target_steps goes from"):
        TargetDrivenConfig(target_steps=(8, 4))
    with pytest.raises(ValueError, match="no null condition"):
        objective_of(VP, guidance_scale=3.0)
