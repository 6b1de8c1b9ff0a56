"""Consistency distillation against analytic oracles: Gaussian data, whose consistency function has a closed form."""

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
from sublimate.pipelines.model import open_model
from sublimate.training.consistency import GuidedSolver, jump
from sublimate.training.distill import check_export
from sublimate.training.losses import pseudo_huber_loss
from sublimate.training.objective import Batch, Turn
from sublimate.training.objectives.consistency_distillation import (
    ConsistencyDistillation,
    ConsistencyDistillationConfig,
)
from sublimate.training.players import Player, PlayerConfig
from sublimate.training.randomness import SampleRandom

VP = DiscreteVP(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0))
SCHEDULES = {"vp": VP, "edm": EDM(sigma_max=20.0), "flow": RectifiedFlow()}
EVERY = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
MEAN, STD = 0.6, 0.5
DATA = GaussianMixture(torch.ones(1), torch.full((1, 1), MEAN), torch.full((1,), STD)).double()
TURN = Turn("student", ("student",))
PLAIN = {"guidance_input": False, "guidance_range": None, "guidance_scale": 1.0}


class Exact(nn.Module):
    """The consistency function of N(m, s^2), as x0-prediction; `mean` and `std` are trainable.

    The probability-flow ODE of a Gaussian keeps (x - alpha m)/sqrt(alpha^2 s^2 + sigma^2), so that
    f(x, t) = m + s (x - alpha m)/sqrt(alpha^2 s^2 + sigma^2).
    """

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.kind = schedule, Parametrization("sample")
        self.mean = nn.Parameter(torch.tensor(MEAN, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(STD, dtype=torch.float64))

    def forward(self, x_t, t, condition=None, *, features=()):
        c = self.schedule.at(as_double(t))
        spread = (c.alpha**2 * self.std**2 + c.sigma**2).sqrt()
        x0 = self.mean + self.std * (x_t - c.alpha[:, None] * self.mean) / spread[:, None]
        return Prediction(x_t, x0, c, self.kind)


def teacher_model(schedule, mixture=DATA):
    denoiser = MixtureDenoiser(mixture, schedule)
    return SimpleNamespace(denoiser=denoiser, latent_shape=(1,), null_condition=Condition)


def tiny_model(schedule):
    """A real network, whose parameters a player can train."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 1)).double()
    denoiser = Denoiser(network, lambda n, x, t, c, f: (n(x), {}), schedule, Parametrization("v_prediction"))
    return SimpleNamespace(denoiser=denoiser, latent_shape=(1,), null_condition=Condition)


def oracle_objective(schedule, **options):
    """The exact teacher of Gaussian data and the exact consistency function as student."""
    objective = ConsistencyDistillation(tiny_model(schedule), ConsistencyDistillationConfig(**PLAIN | options))
    objective.solver = GuidedSolver(teacher_model(schedule), objective.config.grid_steps)
    objective.player = Player(Exact(schedule), PlayerConfig(), frozenset({"mean", "std"}))
    objective.player.set_trainable(True)
    return objective


def batch_of(n, seed=0, **tensors):
    random = SampleRandom(seed, 0, "student", range(n))
    images = MEAN + STD * torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Batch(Condition(), random, {"images": images, **tensors})


def prepared(objective, batch):
    with torch.no_grad():
        batch = objective.prepare(TURN, batch, 0)
    return batch.adding(eps=batch["eps"].double())


@pytest.mark.slow
@EVERY
def test_the_consistency_function_is_the_end_of_ddims_path(schedule):
    """Many DDIM steps with the exact teacher arrive where the closed form says."""
    solver = GuidedSolver(teacher_model(schedule), 1000)
    x = torch.tensor([[-1.0], [0.3], [2.0]], dtype=torch.float64) * schedule.start_scale(schedule.t_max)
    expected = Exact(schedule)(x, torch.full((3,), schedule.t_max)).x0
    for t, to in zip(solver.grid[:-1], solver.grid[1:], strict=True):
        x = solver.step(x, t.expand(3), to.expand(3), Condition(), 1.0)
    torch.testing.assert_close(x, expected, rtol=0, atol=0.02)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("target_decay", [None, 0.95])
def test_the_exact_function_has_no_loss_up_to_discretisation(schedule, target_decay):
    losses = []
    for grid_steps in (50, 100, 200):
        objective = oracle_objective(schedule, grid_steps=grid_steps, target_decay=target_decay, loss="l2")
        batch = prepared(objective, batch_of(4000))
        losses.append(float(objective.loss(TURN, batch, 0).total.detach()))
    # A step of size h errs by h^2, the squared loss by h^4: a sixteenth each time, were the first step not special.
    assert losses[0] < 2e-3
    assert losses[1] < losses[0] / 5
    assert losses[2] < losses[1] / 5


@EVERY
def test_another_function_has_a_loss_and_its_gradient_leads_back(schedule):
    objective = oracle_objective(schedule, grid_steps=100, target_decay=None, loss="l2")
    batch = prepared(objective, batch_of(4000))
    exact = float(objective.loss(TURN, batch, 0).total.detach())
    with torch.no_grad():
        objective.player.module.mean += 0.3
        objective.player.module.std -= 0.2
    loss = objective.loss(TURN, batch, 0).total
    loss.backward()
    assert float(loss) > 5 * exact
    # Only the last step's target is data; through it a wrong mean is pulled down, a small spread up.
    assert float(objective.player.module.mean.grad) > 0 > float(objective.player.module.std.grad)


@EVERY
@pytest.mark.slow
def test_training_finds_the_closed_form(schedule):
    objective = oracle_objective(schedule, grid_steps=20, target_decay=0.5, loss="l2")
    with torch.no_grad():
        objective.player.module.mean.fill_(0.0)
        objective.player.module.std.fill_(1.0)
    optimizer = torch.optim.Adam(objective.player.module.parameters(), lr=0.02)
    for step in range(300):
        loss = objective.loss(TURN, prepared(objective, batch_of(64, seed=step)), step).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(step)
    # What 20 DDIM steps of the teacher make of pure noise is a little less spread than the data.
    assert abs(float(objective.player.module.mean) - MEAN) < 0.03
    assert abs(float(objective.player.module.std) - STD) < 0.07


def manual(objective, batch, target_network):
    """The loss spelled out: neighbours, DDIM by hand, both ends."""
    schedule, t, s = objective.schedule, batch["t"], batch["s"]
    x_t = add_noise(schedule, batch["images"], batch["eps"], t)
    teacher = objective.solver.teacher(x_t, t)
    c = schedule.at(s)
    x_s = c.alpha[:, None] * teacher.x0 + c.sigma[:, None] * teacher.eps
    clean = (s == schedule.t_clean)[:, None]
    target = torch.where(clean, x_s, target_network(x_s, s.clamp_min(schedule.t_min)).x0)
    return objective.player.module(x_t, t).x0, target


@EVERY
@pytest.mark.parametrize("loss", ["l2", "huber"])
def test_no_gradient_flows_through_the_target(schedule, loss):
    objective = oracle_objective(schedule, grid_steps=4, target_decay=None, loss=loss, huber_c=0.1)
    student = objective.player.module
    with torch.no_grad():
        student.mean += 0.3
    batch = prepared(objective, batch_of(64))
    assert bool((batch["s"] == schedule.t_clean).any()) and not bool((batch["s"] == schedule.t_clean).all())
    total = objective.loss(TURN, batch, 0).total
    found = torch.autograd.grad(total, list(student.parameters()))
    x0, target = manual(objective, batch, student)
    difference = (x0 - target.detach()).square()
    expected = (difference if loss == "l2" else (difference + 0.01).sqrt() - 0.1).mean()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-9)
    for a, b in zip(found, torch.autograd.grad(expected, list(student.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_the_target_is_a_moving_average_that_survives_a_restart():
    objective = oracle_objective(VP, target_decay=0.9)
    batch = prepared(objective, batch_of(8))
    objective.loss(TURN, batch, 0)
    with torch.no_grad():
        objective.player.module.mean += 1.0
    torch.testing.assert_close(objective._averaged.values["mean"], torch.tensor(MEAN))
    objective.after_step(0)
    torch.testing.assert_close(objective.state()["target.mean"], torch.tensor(MEAN + 0.1))
    average = Exact(VP)
    with torch.no_grad():
        average.mean += 0.1
    x, t = batch["images"], batch["t"]
    target = objective.target(x, t, Condition()).x0
    torch.testing.assert_close(target, average(x, t).x0, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(target, objective.player.module(x, t).x0, atol=1e-2)

    resumed = oracle_objective(VP, target_decay=0.9)
    with torch.no_grad():
        resumed.player.module.mean += 1.0
    resumed.load_state(objective.state())
    torch.testing.assert_close(
        resumed.loss(TURN, batch, 0).total, objective.loss(TURN, batch, 0).total, rtol=1e-6, atol=0
    )
    with pytest.raises(ValueError, match="target does not fit"):
        oracle_objective(VP, target_decay=None).load_state(objective.state())


def test_huber_is_quadratic_near_and_absolute_far():
    x = torch.tensor([[1e-5, -1e-5], [3.0, -5.0]])
    loss = pseudo_huber_loss(x, torch.zeros_like(x), 1e-3)
    torch.testing.assert_close(loss, torch.tensor([1e-10 / 2e-3, 4.0 - 1e-3]), rtol=1e-4, atol=0)


def test_the_default_grid_is_that_of_latent_consistency_models():
    """k = 20: 19, 39, ..., 999; four steps are 999, 759, 499, 259, as LCMScheduler has them."""
    objective = oracle_objective(VP)
    assert objective.solver.grid.tolist() == [*map(float, range(999, 0, -20)), -1.0]
    assert objective.few_steps.call_times(VP) == (999, 759, 499, 259)


def test_lcms_boundary_scalings_leave_x0_alone():
    """What the class docstring says of c_skip and c_out."""
    t = torch.arange(19, 1000, 20, dtype=torch.float64)
    c_skip = 0.25 / ((10 * t) ** 2 + 0.25)
    c_out = 10 * t / ((10 * t) ** 2 + 0.25).sqrt()
    assert float(c_skip.max()) < 1e-5
    assert float((1 - c_out).max()) < 1e-5


@EVERY
def test_a_jump_to_its_start_is_the_identity_and_jumps_of_one_path_compose(schedule):
    point = GaussianMixture(torch.ones(1), torch.full((1, 1), MEAN), torch.zeros(1)).double()
    exact = MixtureDenoiser(point, schedule)
    t, r, s = (schedule.uniform_time(torch.full((4,), u)) for u in (0.8, 0.5, 0.2))
    x = torch.randn(4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    empty = Condition()
    torch.testing.assert_close(jump(exact, schedule, x, t, t, empty), x, rtol=1e-9, atol=1e-9)
    there = jump(exact, schedule, jump(exact, schedule, x, t, r, empty), r, s, empty)
    torch.testing.assert_close(there, jump(exact, schedule, x, t, s, empty), rtol=1e-9, atol=1e-9)
    clean = torch.full_like(t, schedule.t_clean)
    assert torch.equal(jump(exact, schedule, x, clean, clean, empty), x)
    torch.testing.assert_close(jump(exact, schedule, x, t, clean, empty), exact(x, t).x0, rtol=1e-9, atol=1e-9)


def test_the_teacher_is_guided_by_each_samples_own_scale():
    """In LCM's form: x_c + w (x_c - x_u) with w = scale - 1."""
    mixture = GaussianMixture(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.tensor([0.4, 0.3])).double()
    denoiser = MixtureDenoiser(mixture, VP)
    null = Condition(text=torch.tensor([2]))
    model = SimpleNamespace(denoiser=denoiser, latent_shape=(1,), null_condition=lambda: null)
    solver = GuidedSolver(model, 50)
    x = torch.randn(3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, s = solver.neighbours(torch.tensor([0, 20, 40]))
    condition, scale = Condition(text=torch.tensor([0, 1, 0])), torch.tensor([1.0, 3.0, 7.5])
    given, without = denoiser(x, t, condition), denoiser(x, t, null)
    w = (scale.double() - 1)[:, None]
    x0, eps = given.x0 + w * (given.x0 - without.x0), given.eps + w * (given.eps - without.eps)
    c = VP.at(s)
    expected = c.alpha[:, None] * x0 + c.sigma[:, None] * eps
    torch.testing.assert_close(solver.step(x, t, s, condition, scale), expected)


@pytest.fixture(scope="module")
def told(request):
    """A real student that is told the scale."""
    torch.manual_seed(0)
    return open_model(request.getfixturevalue("tiny_sd_v"))


def told_batch(model, n=3):
    condition = model.encode_prompts(["a cat", "a dog", "red"][:n])
    images = torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    return Batch(condition, SampleRandom(0, 0, "student", range(n)), {"images": images})


def test_a_student_told_the_scale_starts_out_as_the_teacher(told):
    objective = ConsistencyDistillation(told, ConsistencyDistillationConfig())
    condition = told_batch(told).condition
    x, t = torch.randn(3, *told.latent_shape), torch.tensor([999.0, 500.0, 19.0])
    with torch.no_grad():
        expected = told.denoiser(x, t, condition).output
        for scale in (1.0, 7.0, 15.0):
            found = objective.player.module(x, t, condition.replace(guidance=torch.full((3,), scale))).output
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert objective.exports().few_steps.guidance_scale == 8.5
    assert objective.exports().module.network.config.time_cond_proj_dim == 256


@pytest.mark.slow
def test_the_scale_is_drawn_from_the_range_and_told_to_student_and_target(told, monkeypatch):
    objective = ConsistencyDistillation(
        told, ConsistencyDistillationConfig(guidance_scale=4.0, guidance_range=(3.0, 5.0))
    )
    batch = objective.prepare(TURN, told_batch(told), 0)
    assert bool(((batch["scale"] >= 3) & (batch["scale"] <= 5)).all()) and len(batch["scale"].unique()) == 3
    seen = []
    forward = Denoiser.forward

    def watched(denoiser, x_t, t, condition=None, **options):
        seen.append(condition)
        return forward(denoiser, x_t, t, condition, **options)

    monkeypatch.setattr(Denoiser, "forward", watched)
    objective.loss(TURN, batch, 0)
    teacher, target, student = seen
    assert "guidance" not in teacher and len(teacher["text"]) == 6
    for condition in (target, student):
        torch.testing.assert_close(condition["guidance"].double(), batch["scale"])


def test_a_fixed_scale_equals_a_range_of_that_scale(told):
    batch = told_batch(told)
    losses = []
    for options in ({"guidance_scale": 4.0, "guidance_range": None}, {"guidance_range": (4.0, 4.0)}):
        objective = ConsistencyDistillation(told, ConsistencyDistillationConfig(guidance_input=False, **options))
        drawn = objective.prepare(TURN, batch, 0).adding(t=torch.tensor([999.0, 499.0, 19.0]).double())
        drawn = drawn.adding(s=drawn["t"] - 20, eps=torch.ones(3, *told.latent_shape))
        losses.append(objective.loss(TURN, drawn, 0).total)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["tiny_lcm", "tiny_flux"])
def test_a_network_that_is_told_guidance_already_carries_a_lora(request, name):
    model = open_model(request.getfixturevalue(name))
    objective = ConsistencyDistillation(
        model, ConsistencyDistillationConfig(student=PlayerConfig(kind="lora", rank=2))
    )
    assert objective.exports().kind == "lora"
    check_export(model, objective.exports())


def test_what_does_not_fit_is_refused(told, request):
    lora = PlayerConfig(kind="lora", rank=2)
    with pytest.raises(ValueError, match="no LoRA holds"):
        ConsistencyDistillation(told, ConsistencyDistillationConfig(student=lora))
    with pytest.raises(ValueError, match="cannot be told the guidance scale"):
        ConsistencyDistillation(
            open_model(request.getfixturevalue("tiny_unconditional")), ConsistencyDistillationConfig()
        )
    with pytest.raises(ValueError, match="no null condition"):
        ConsistencyDistillation(tiny_model(VP), ConsistencyDistillationConfig(guidance_input=False))
    with pytest.raises(ValueError, match="a range of guidance goes from"):
        ConsistencyDistillationConfig(guidance_range=(5.0, 2.0))
    with pytest.raises(ValueError, match=r"guidance_scale is 8\.5, .* choose one of guidance_range, 2\.0 to 5\.0"):
        ConsistencyDistillationConfig(guidance_range=(2.0, 5.0))
    with pytest.raises(ValueError, match="guidance_scale is not used where guidance_range is given"):
        ConsistencyDistillationConfig(guidance_input=False, guidance_scale=2.0)
    assert ConsistencyDistillationConfig(guidance_input=False, guidance_range=(2.0, 4.0)).sample_guidance == 3.0
    with pytest.raises(ValueError, match="no 4 steps"):
        ConsistencyDistillation(tiny_model(VP), ConsistencyDistillationConfig(**PLAIN, grid_steps=3))
