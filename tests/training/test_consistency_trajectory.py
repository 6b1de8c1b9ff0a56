"""Consistency trajectories against the exact flow of Gaussian data, and as real networks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from sublimate.diffusion.noise import as_double
from sublimate.diffusion.predictions import Parametrization, Prediction, add_noise
from sublimate.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow
from sublimate.pipelines.few_steps import sample_few_steps
from sublimate.pipelines.model import open_model
from sublimate.pipelines.sampling import telling
from sublimate.training.consistency import GuidedSolver
from sublimate.training.objective import Batch, Turn
from sublimate.training.objectives.consistency_distillation import (
    ConsistencyDistillation,
    ConsistencyDistillationConfig,
)
from sublimate.training.objectives.consistency_trajectory import ConsistencyTrajectory, ConsistencyTrajectoryConfig
from sublimate.training.players import Player, PlayerConfig
from sublimate.training.randomness import SampleRandom

VP = DiscreteVP(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0))
SCHEDULES = {"vp": VP, "edm": EDM(sigma_max=20.0), "flow": RectifiedFlow()}
EVERY = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
MEAN, STD = 0.6, 0.5
DATA = GaussianMixture(torch.ones(1), torch.full((1, 1), MEAN), torch.full((1,), STD)).double()
TURN = Turn("student", ("student",))


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


class ExactFlow(nn.Module):
    """g(x, t, s) of N(m, s^2), whose flow keeps (x - alpha m)/sqrt(alpha^2 s^2 + sigma^2); m and s can train."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.kind = schedule, Parametrization("sample")
        self.mean, self.std = nn.Parameter(doubles(MEAN)[0]), nn.Parameter(doubles(STD)[0])

    def flow(self, x_t, t, s):
        a, b = self.schedule.at(as_double(t)), self.schedule.at(as_double(s))
        spread = ((b.alpha * self.std) ** 2 + b.sigma**2) / ((a.alpha * self.std) ** 2 + a.sigma**2)
        return b.alpha[:, None] * self.mean + (x_t - a.alpha[:, None] * self.mean) * spread.sqrt()[:, None]

    def forward(self, x_t, t, condition=None, *, features=()):
        t = as_double(t).expand(len(x_t))
        s = condition.get("target_time", torch.full_like(t, self.schedule.t_clean)).double()
        a, b = self.schedule.at(t), self.schedule.at(s)
        ratio = (b.sigma / a.sigma)[:, None]
        factor = b.alpha[:, None] - a.alpha[:, None] * ratio
        far = (self.flow(x_t, t, s) - ratio * x_t) / torch.where(factor.abs() < 1e-12, 1.0, factor)
        # At s = t the limit is the denoiser.
        gain = (a.alpha * self.std**2 / ((a.alpha * self.std) ** 2 + a.sigma**2))[:, None]
        near = self.mean + gain * (x_t - a.alpha[:, None] * self.mean)
        return Prediction(x_t, torch.where(factor.abs() < 1e-12, near, far), a, self.kind)


def tiny_model(schedule, kind="v_prediction"):
    """A real network that is told x, t and the target."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 1)).double()

    def call(network, x, t, condition, features):
        told = condition.get("target_time", torch.full_like(t, schedule.t_clean))
        return network(torch.stack([x[:, 0], t.to(x) / 1000, told.to(x) / 1000], 1)), {}

    denoiser = Denoiser(network, call, schedule, Parametrization(kind, 0.5))
    return SimpleNamespace(
        denoiser=denoiser,
        latent_shape=(1,),
        null_condition=Condition,
        denoiser_with_number_input=lambda: denoiser,
    )


def gaussian_solver(schedule, grid_steps):
    teacher = SimpleNamespace(denoiser=MixtureDenoiser(DATA, schedule), null_condition=Condition)
    return GuidedSolver(teacher, grid_steps)


def real_objective(schedule, kind="v_prediction", **options):
    """A real student of the exact teacher."""
    options = {"target_decay": None, "grid_steps": 10, **options}
    objective = ConsistencyTrajectory(tiny_model(schedule, kind), ConsistencyTrajectoryConfig(**options))
    objective.solver = gaussian_solver(schedule, objective.config.grid_steps)
    objective.player.set_trainable(True)
    return objective


def oracle_objective(schedule, **options):
    """The exact flow as student of the exact teacher."""
    objective = real_objective(schedule, **options)
    objective.player = Player(ExactFlow(schedule), PlayerConfig(), frozenset({"mean", "std"}))
    objective.player.set_trainable(True)
    return objective


def prepared(objective, n, seed=0):
    random = SampleRandom(seed, 0, "student", range(n))
    images = MEAN + STD * torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        batch = objective.prepare(TURN, Batch(Condition(), random, {"images": images}), 0)
    return batch.adding(eps=batch["eps"].double())


def levels(schedule, *fractions):
    return [schedule.uniform_time(doubles(*[u] * 5)) for u in fractions]


def points(schedule):
    return torch.linspace(-2, 3, 5, dtype=torch.float64)[:, None]


EMPTY = SimpleNamespace(condition=Condition())


@EVERY
def test_a_jump_is_the_published_combination_in_noise_levels(schedule):
    """x_s/alpha_s = (s/t) x_t/alpha_t + (1 - s/t) g, whatever the network."""
    objective = real_objective(schedule)
    t, s = levels(schedule, 0.8, 0.3)
    x_t, (a, b) = points(schedule), (schedule.at(t), schedule.at(s))
    g = objective.student(x_t, t, Condition(target_time=s)).x0
    ratio = ((b.sigma / b.alpha) / (a.sigma / a.alpha))[:, None]
    expected = ratio * x_t / a.alpha[:, None] + (1 - ratio) * g
    found = objective.jump(objective.student, x_t, t, s, EMPTY) / b.alpha[:, None]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@EVERY
def test_a_jump_to_where_it_starts_is_the_identity_of_any_network(schedule):
    objective = real_objective(schedule)
    clean = torch.full((5,), schedule.t_clean, dtype=torch.float64)
    for t in levels(schedule, 0.0, 0.4, 1.0):
        found = objective.jump(objective.student, points(schedule), t, t, EMPTY)
        torch.testing.assert_close(found, points(schedule), rtol=1e-9, atol=1e-9)
    assert torch.equal(objective.jump(objective.student, points(schedule), clean, clean, EMPTY), points(schedule))
    (t,) = levels(schedule, 0.7)
    at_clean = objective.jump(objective.student, points(schedule), t, clean, EMPTY)
    torch.testing.assert_close(at_clean, objective.student(points(schedule), t, Condition()).x0)


@EVERY
def test_jumps_of_the_exact_flow_compose_and_end_at_the_consistency_function(schedule):
    objective = oracle_objective(schedule)
    t, u, s = levels(schedule, 0.9, 0.6, 0.2)
    clean = torch.full_like(t, schedule.t_clean)
    x_t, flow = points(schedule), objective.student

    def jump(x, start, end):
        return objective.jump(flow, x, start, end, EMPTY)

    torch.testing.assert_close(jump(jump(x_t, t, u), u, s), jump(x_t, t, s), rtol=1e-9, atol=1e-9)
    c = schedule.at(t)
    spread = ((c.alpha * STD) ** 2 + c.sigma**2).sqrt()[:, None]
    consistency = MEAN + STD * (x_t - c.alpha[:, None] * MEAN) / spread
    for path in (jump(x_t, t, clean), jump(jump(x_t, t, s), s, clean)):
        torch.testing.assert_close(path, consistency, rtol=1e-9, atol=1e-9)


@EVERY
@pytest.mark.parametrize("solver_steps", [1, 3])
def test_the_exact_flow_has_no_loss_up_to_discretisation(schedule, solver_steps):
    """DDIM errs by h^2 in a step of size h, the near-squared loss by h^4: a sixteenth for twice the steps."""
    losses = []
    for grid_steps in (50, 100, 200):
        objective = oracle_objective(schedule, grid_steps=grid_steps, solver_steps=solver_steps, huber_c=1.0)
        losses.append(float(objective.loss(TURN, prepared(objective, 1000), 0).total.detach()))
    assert losses[0] < 2e-3
    assert losses[1] < losses[0] / 5
    assert losses[2] < losses[1] / 5


@EVERY
@pytest.mark.parametrize("target_decay", [None, 0.9])
def test_with_clean_targets_alone_it_is_consistency_distillation(schedule, target_decay):
    """The same student, draws and loss: CTM at s = 0 is CD."""
    ours = oracle_objective(schedule, target_decay=target_decay, huber_c=1e-3)
    options = {"guidance_input": False, "guidance_range": None, "guidance_scale": 1.0, "sampling_steps": 1}
    theirs = ConsistencyDistillation(
        tiny_model(schedule), ConsistencyDistillationConfig(target_decay=target_decay, grid_steps=10, **options)
    )
    theirs.player, theirs.solver = ours.player, ours.solver
    with torch.no_grad():
        ours.student.std += 0.2
    batch = prepared(ours, 256)
    found = ours.loss(TURN, batch.adding(s=torch.full_like(batch["s"], 10)), 0).total
    t, s = ours.solver.neighbours(batch["t"])
    expected = theirs.loss(TURN, batch.adding(t=t, s=s), 0).total
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found, expected = (torch.autograd.grad(loss, list(ours.student.parameters())) for loss in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@EVERY
def test_the_gradient_passes_through_the_held_jump_and_through_nothing_else(schedule):
    """The loss written out with the exact flow of (m, s); sg is a copy of both that has no gradient."""
    objective = oracle_objective(schedule, huber_c=0.1)
    with torch.no_grad():
        objective.student.mean += 0.3
        objective.student.std += 0.2
    batch = prepared(objective, 512)
    total = objective.loss(TURN, batch, 0).total
    found = torch.stack(torch.autograd.grad(total, list(objective.student.parameters())))

    live, held = ExactFlow(schedule), ExactFlow(schedule).requires_grad_(False)
    live.load_state_dict(objective.student.state_dict())
    held.load_state_dict(objective.student.state_dict())
    grid = objective.solver.grid
    t, u, s = grid[batch["t"]], grid[batch["t"] + 1], grid[batch["s"]]
    clean = torch.full_like(t, schedule.t_clean)
    assert bool((u == s).any()) and bool((u > s).any()) and bool((s == clean).any())
    x_t, c = add_noise(schedule, batch["images"], batch["eps"], t), schedule.at(u)
    exact = MixtureDenoiser(DATA, schedule)(x_t, t)
    x_u = c.alpha[:, None] * exact.x0 + c.sigma[:, None] * exact.eps
    target = held.flow(held.flow(x_u, u, s), s, clean)
    estimate = held.flow(live.flow(x_t, t, s), s, clean)
    expected = (((estimate - target).square() + 0.01).sqrt() - 0.1).mean()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-9)
    expected = torch.stack(torch.autograd.grad(expected, list(live.parameters())))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_targets_are_drawn_below_the_start_and_the_solver_stops_at_them():
    objective = real_objective(VP, grid_steps=10, solver_steps=3)
    batch = prepared(objective, 4000)
    t, s = batch["t"], batch["s"]
    assert bool((t < s).all()) and int(t.min()) == 0 and int(t.max()) == 9 and int(s.max()) == 10
    counts = torch.bincount(s[t == 6], minlength=11)
    assert counts[:7].sum() == 0 and bool((counts[7:] > 60).all())

    batch = batch.adding(t=torch.tensor([0, 2, 8, 9]), s=torch.tensor([7, 4, 10, 10]))
    x_t = torch.linspace(-1, 2, 4, dtype=torch.float64)[:, None]
    x_u, u = objective._solved(x_t, batch)
    grid, exact = objective.solver.grid, MixtureDenoiser(DATA, VP)
    for i, (start, end) in enumerate([(0, 3), (2, 4), (8, 10), (9, 10)]):
        x = x_t[i : i + 1]
        for k in range(start, end):
            c = VP.at(grid[k + 1])
            x = exact(x, grid[k]).combine(c.alpha, c.sigma)
        torch.testing.assert_close(x_u[i : i + 1], x, rtol=1e-9, atol=1e-9)
        assert u[i] == grid[end]


def test_the_target_is_a_moving_average_that_survives_a_restart():
    objective = oracle_objective(VP, target_decay=0.9)
    batch = prepared(objective, 8)
    before = objective.loss(TURN, batch, 0).total
    with torch.no_grad():
        objective.student.mean += 1.0
    assert float(objective.target.mean) == pytest.approx(MEAN)
    objective.after_step(0)
    assert float(objective.target.mean) == pytest.approx(MEAN + 0.1)
    assert objective.loss(TURN, batch, 0).total != before
    assert not any(p.requires_grad for p in objective.target.parameters())

    resumed = oracle_objective(VP, target_decay=0.9)
    with torch.no_grad():
        resumed.student.mean += 1.0
    resumed.load_state(objective.state())
    torch.testing.assert_close(resumed.loss(TURN, batch, 0).total, objective.loss(TURN, batch, 0).total)
    with pytest.raises(ValueError, match="target does not fit"):
        oracle_objective(VP).load_state(objective.state())


def test_without_an_average_the_target_is_the_student_as_it_is_now():
    objective = oracle_objective(VP)
    assert objective.state() == {}
    with torch.no_grad():
        objective.student.mean += 1.0
    assert float(objective.target.mean) == pytest.approx(MEAN + 1.0)
    objective.after_step(0)
    assert float(objective.target.mean) == pytest.approx(MEAN + 1.0)
    assert not objective.target.mean.requires_grad and objective.student.mean.requires_grad


def test_the_denoising_term_has_edms_weight_and_tells_the_network_its_own_time():
    """For EDM's F, |F - F*|^2 is (t^2 + sigma_data^2)/(t sigma_data)^2 |x0 - g(x_t, t, t)|^2."""
    schedule = EDM(sigma_max=20.0)
    plain = real_objective(schedule, kind="edm")
    both = real_objective(schedule, kind="edm", denoising_weight=0.7)
    batch = prepared(plain, 64)
    t = plain.solver.grid[batch["t"]]
    x_t = add_noise(schedule, batch["images"], batch["eps"], t)
    g = plain.student(x_t, t, Condition(target_time=t)).x0
    weight = (t**2 + 0.25) / (t * 0.5) ** 2
    term = (weight[:, None] * (batch["images"] - g).square()).mean()
    expected = plain.loss(TURN, batch, 0).total.double() + 0.7 * term
    torch.testing.assert_close(both.loss(TURN, batch, 0).total.double(), expected, rtol=1e-5, atol=0)
    assert both.config.passes() == plain.config.passes() + 3


@EVERY
@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_few_jumps_of_the_exact_flow_draw_the_data(schedule, gamma):
    """In one jump or many; without fresh noise all of them end at the very same x0."""
    objective = oracle_objective(schedule, sampling_steps=4, sampling_gamma=gamma)
    few = objective.exports().few_steps
    assert (few.sampler, few.steps, few.eta) == ("trajectory", 4, gamma)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 1, dtype=torch.float64, generator=generator)
    told = telling(objective.student, Condition(), Condition(), 1.0, reads_target=True)
    with torch.no_grad():
        x0 = sample_few_steps(few, told, z, schedule, lambda x: torch.randn(x.shape, generator=generator).to(x))
        start = torch.full((len(z),), schedule.t_max, dtype=torch.float64)
        x_t = schedule.start_scale(schedule.t_max) * z
        one = objective.student.flow(x_t, start, torch.full_like(start, schedule.t_clean))
    if gamma == 0:
        torch.testing.assert_close(x0, one, rtol=1e-6, atol=1e-6)
    # The schedules' ends keep some signal, which pure noise does not have.
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.04)
    assert float(x0.std()) == pytest.approx(STD, abs=0.02)


def test_one_step_is_exported_without_a_sampler():
    artefact = real_objective(VP).exports()
    assert artefact.few_steps is None and artefact.start_time is None and artefact.kind == "weights"


@pytest.fixture(scope="module")
def told(request):
    torch.manual_seed(0)
    return open_model(str(request.getfixturevalue("tiny_sd_v")))


def test_a_network_that_is_told_no_target_is_told_clean_data(told):
    """So the stock pipeline, which tells a guidance of none, draws G(x, t, 0)."""
    student = ConsistencyTrajectory(told, ConsistencyTrajectoryConfig()).student
    with torch.no_grad():
        student.network.time_embedding.cond_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
        condition = told.encode_prompts(["a cat", "a dog"])
        x, t = torch.randn(2, *told.latent_shape), torch.tensor([999.0, 400.0])
        plain = student(x, t, condition).output
        clean = student(x, t, condition.replace(target_time=torch.full((2,), told.schedule.t_clean))).output
        unguided = student(x, t, condition.replace(guidance=torch.ones(2))).output
        elsewhere = student(x, t, condition.replace(target_time=torch.tensor([500.0, 300.0]))).output
    assert torch.equal(plain, clean) and torch.equal(plain, unguided)
    assert not torch.allclose(plain, elsewhere)


def test_the_new_layer_trains_and_the_student_starts_out_as_the_teacher(told):
    objective = ConsistencyTrajectory(told, ConsistencyTrajectoryConfig(guidance_scale=3.0, target_decay=None))
    objective.player.set_trainable(True)
    condition = told.encode_prompts(["a cat", "a dog", "red"])
    images = torch.randn(3, *told.latent_shape, generator=torch.Generator().manual_seed(1))
    batch = Batch(condition, SampleRandom(0, 0, "student", range(3)), {"images": images})
    batch = objective.prepare(TURN, batch, 0)
    x, t = torch.randn(3, *told.latent_shape), torch.tensor([999.0, 500.0, 19.0])
    with torch.no_grad():
        expected = told.denoiser(x, t, condition).output
        found = objective.student(x, t, condition.replace(target_time=t / 2)).output
        assert torch.equal(found, expected)
    objective.loss(TURN, batch, 0).total.backward()
    layer = objective.student.network.time_embedding.cond_proj
    assert layer.weight.grad is not None and bool(layer.weight.grad.abs().sum() > 0)
    assert all(p.grad is None for p in (*objective.target.parameters(), *told.denoiser.parameters()))


def test_what_does_not_fit_is_refused(request):
    with pytest.raises(ValueError, match="no LoRA holds"):
        ConsistencyTrajectoryConfig(student=PlayerConfig(kind="lora"))
    with pytest.raises(ValueError, match="unguided denoiser"):
        ConsistencyTrajectoryConfig(guidance_scale=2.0, denoising_weight=1.0)
    with pytest.raises(ValueError, match="no null condition"):
        ConsistencyTrajectory(tiny_model(VP), ConsistencyTrajectoryConfig(guidance_scale=2.0))
    with pytest.raises(ValueError, match="cannot be told the guidance scale or a target time"):
        ConsistencyTrajectory(
            open_model(str(request.getfixturevalue("tiny_unconditional"))), ConsistencyTrajectoryConfig()
        )


@pytest.mark.slow
@EVERY
def test_training_finds_the_flow(schedule):
    objective = oracle_objective(schedule, grid_steps=40, target_decay=0.5, huber_c=1.0)
    with torch.no_grad():
        objective.student.mean.fill_(0.0)
        objective.student.std.fill_(1.0)
    optimizer = torch.optim.Adam(objective.student.parameters(), lr=0.02)
    for step in range(800):
        optimizer.zero_grad()
        objective.loss(TURN, prepared(objective, 64, seed=step), step).total.backward()
        optimizer.step()
        objective.after_step(step)
    assert objective.student.mean.item() == pytest.approx(MEAN, abs=0.03)
    assert objective.student.std.item() == pytest.approx(STD, abs=0.07)
