"""Schedules: derivatives, inverses, grids and times, each against an independent formula."""

import copy
import math

import pytest
import torch

from sublimate.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow, TrigFlow

TABLE = torch.cumprod(1 - torch.linspace(0.01, 0.2, 20, dtype=torch.float64), 0)
ZERO_TERMINAL = torch.cat([TABLE[:-1], torch.zeros(1, dtype=torch.float64)])
SCHEDULES = {
    "discrete": DiscreteVP(TABLE),
    "zero_terminal": DiscreteVP(ZERO_TERMINAL),
    "edm": EDM(0.002, 80.0),
    "flow": RectifiedFlow(shift=3.0),
    "trig": TrigFlow(0.5),
}
EVERY = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def inner_times(schedule, n=41):
    """Times strictly inside the range and off a table's whole numbers."""
    u = (torch.arange(n, dtype=torch.float64) + 0.37) / n
    return schedule.t_min + u * (schedule.t_max - schedule.t_min)


@EVERY
def test_derivatives_are_those_of_alpha_and_sigma(schedule):
    t = inner_times(schedule).requires_grad_(True)
    c = schedule.at(t)
    (d_alpha,) = torch.autograd.grad(c.alpha.sum() + 0 * t.sum(), t, retain_graph=True)
    (d_sigma,) = torch.autograd.grad(c.sigma.sum(), t)
    torch.testing.assert_close(c.d_alpha, d_alpha, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(c.d_sigma, d_sigma, rtol=1e-10, atol=1e-12)


@EVERY
def test_derivatives_match_finite_differences(schedule):
    t, h = inner_times(schedule), 1e-6
    above, below, c = schedule.at(t + h), schedule.at(t - h), schedule.at(t)
    torch.testing.assert_close(c.d_alpha, (above.alpha - below.alpha) / (2 * h), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(c.d_sigma, (above.sigma - below.sigma) / (2 * h), rtol=1e-6, atol=1e-7)


@EVERY
def test_log_snr_and_its_inverse(schedule):
    t = inner_times(schedule)
    c = schedule.at(t)
    torch.testing.assert_close(schedule.log_snr(t), (c.alpha**2 / c.sigma**2).log())
    torch.testing.assert_close(schedule.t_at_log_snr(schedule.log_snr(t)), t, rtol=1e-10, atol=1e-10)


@EVERY
def test_ends(schedule):
    clean = schedule.at(schedule.t_clean)
    assert clean.sigma == 0 and clean.alpha == 1
    assert schedule.log_snr(schedule.t_clean) == math.inf
    noisiest = schedule.at(schedule.t_max)
    # x at t_max is pure noise of noise_scale, but for what signal the schedule keeps.
    assert float(torch.hypot(noisiest.sigma, noisiest.alpha)) == pytest.approx(schedule.noise_scale, rel=1e-4)
    assert schedule.t_clean < schedule.t_min < schedule.t_max


@EVERY
def test_shape_and_precision_follow_t(schedule):
    for t in (schedule.t_max, torch.tensor(schedule.t_max), torch.full((3,), schedule.t_max, dtype=torch.float32)):
        for value in (*schedule.at(t), schedule.log_snr(t), schedule.network_time(t)):
            assert value.dtype == torch.float64
            assert value.shape == getattr(t, "shape", ())


@EVERY
def test_copies_are_shared(schedule):
    assert copy.deepcopy(schedule) is schedule


@EVERY
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_grids_descend_from_t_max_to_clean(schedule, steps):
    grid = schedule.grid(steps)
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float64
    assert grid[0] == pytest.approx(schedule.t_max) and grid[-1] == schedule.t_clean
    assert (grid.diff() < 0).all() and grid[-2] >= schedule.t_min - 1e-12


@EVERY
def test_times_of_training_cover_the_range(schedule):
    u = torch.linspace(0, 1, 101, dtype=torch.float32)
    t = schedule.uniform_time(u)
    assert t.dtype == torch.float64 and (t.diff() >= 0).all()
    assert float(t[0]) == pytest.approx(schedule.t_min) and float(t[-1]) == pytest.approx(schedule.t_max)
    inner = schedule.uniform_time(u, 0.25, 0.5)
    torch.testing.assert_close(inner[[0, -1]], schedule.uniform_time(torch.tensor([0.25, 0.5])))


def test_discrete_times_are_whole_and_equally_likely():
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    t = SCHEDULES["discrete"].uniform_time(u)
    assert torch.equal(torch.bincount(t.long()), torch.full((20,), 100))


def test_discrete_table_is_interpolated_in_log():
    schedule = SCHEDULES["discrete"]
    nodes = torch.arange(20.0)
    torch.testing.assert_close(schedule.at(nodes).alpha ** 2, TABLE)
    torch.testing.assert_close(schedule.at(3.25).alpha ** 2, TABLE[3] ** 0.75 * TABLE[4] ** 0.25)
    # alphas_cumprod(-1) = 1.
    torch.testing.assert_close(schedule.at(-0.5).alpha ** 2, TABLE[0].sqrt())


def test_zero_terminal_snr_reaches_exactly_zero():
    schedule = SCHEDULES["zero_terminal"]
    c = schedule.at(schedule.t_max)
    assert c.alpha == 0 and c.sigma == 1
    assert torch.isfinite(torch.stack(schedule.at(torch.tensor([18.0, 18.5, 19.0])))).all()
    torch.testing.assert_close(schedule.at(18.0).alpha ** 2, TABLE[18])
    torch.testing.assert_close(schedule.at(18.5).alpha, TABLE[18].sqrt() / 2)
    assert schedule.log_snr(schedule.t_max) == -math.inf
    assert schedule.t_at_log_snr(-math.inf) == schedule.t_max


def test_inverse_of_levels_outside_the_table():
    schedule = SCHEDULES["discrete"]
    assert schedule.t_at_log_snr(math.inf) == schedule.t_clean
    assert schedule.t_at_log_snr(-100.0) == schedule.t_max


def test_edm_grid_is_karras():
    grid = EDM(0.002, 80, rho=7).grid(5)
    expected = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)] + [0.0]
    torch.testing.assert_close(grid, torch.tensor(expected, dtype=torch.float64))


def test_trigflow_grid_is_even():
    torch.testing.assert_close(TrigFlow().grid(4), torch.linspace(math.pi / 2, 0, 5, dtype=torch.float64))


def test_edm_tells_the_network_its_c_noise():
    sigma = torch.tensor([0.5, 3.0])
    torch.testing.assert_close(EDM().network_time(sigma), 0.25 * sigma.double().log())
    assert float(RectifiedFlow().network_time(0.25)) == 250
    assert float(SCHEDULES["discrete"].network_time(7)) == 7


def test_shift_warps_grid_and_times_but_not_the_path():
    plain, shifted = RectifiedFlow(), RectifiedFlow(shift=3.0)
    torch.testing.assert_close(torch.stack(plain.at(0.3)), torch.stack(shifted.at(0.3)))
    s = plain.grid(4)
    torch.testing.assert_close(shifted.grid(4), 3 * s / (1 + 2 * s))
    u = torch.tensor([0.2, 0.7], dtype=torch.float64)
    s = plain.uniform_time(u)
    torch.testing.assert_close(shifted.uniform_time(u), 3 * s / (1 + 2 * s))


def test_pure_noise_of_a_student_trained_at_another_time():
    assert EDM(0.002, 80).start_scale(2.5) == 2.5
    assert SCHEDULES["discrete"].start_scale(7.0) == 1
    assert TrigFlow(0.5).start_scale(1.0) == 0.5


def test_a_table_may_be_clean_at_its_first_time():
    table = SCHEDULES["discrete"].alphas_cumprod
    ours = DiscreteVP(torch.cat([torch.ones(1, dtype=torch.float64), table[1:]]))
    assert (ours.t_clean, ours.t_min, ours.t_max) == (0, 1, len(table) - 1)
    assert float(ours.at(0.0).sigma) == 0
    later = torch.arange(1.0, len(table), dtype=torch.float64)
    assert torch.equal(ours.at(later).sigma, SCHEDULES["discrete"].at(later).sigma)
    assert float(ours.t_at_log_snr(float("inf"))) == 0
    torch.testing.assert_close(ours.t_at_log_snr(ours.log_snr(later)), later)
    u = torch.linspace(0, 1, 1000, dtype=torch.float64)
    assert torch.equal(ours.uniform_time(u).unique(), later)
    assert torch.equal(ours.grid(5), torch.cat([SCHEDULES["discrete"].grid(5)[:-1], torch.zeros(1)]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DiscreteVP(torch.tensor([0.5, 0.6])),
        lambda: DiscreteVP(torch.tensor([0.5, -0.1])),
        lambda: DiscreteVP(torch.tensor([1.0, 1.0])),
        lambda: DiscreteVP(torch.tensor([1.1, 0.5])),
        lambda: DiscreteVP(torch.tensor([1.0, 0.5, 0.2])).grid(2),
        lambda: DiscreteVP(torch.tensor([1.0, 0.5, 0.2])).grid(1, "linspace"),
        lambda: DiscreteVP(torch.ones(2, 2)),
        lambda: EDM(80, 0.002),
        lambda: EDM(rho=0),
        lambda: RectifiedFlow(shift=0),
        lambda: TrigFlow(0),
        lambda: SCHEDULES["discrete"].grid(0),
        lambda: SCHEDULES["discrete"].grid(21),
        lambda: SCHEDULES["edm"].grid(5, "linspace"),
        lambda: SCHEDULES["edm"].uniform_time(torch.zeros(1), 0.9, 0.1),
    ],
)
def test_bad_input_is_refused(make):
    with pytest.raises(ValueError):
        make()
