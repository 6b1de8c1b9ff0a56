"""Predictions: every quantity from every kind of output, on every schedule, in float64."""

import copy
import math

import pytest
import torch

from sublimate.diffusion.predictions import KINDS, Parametrization, Prediction, add_noise
from sublimate.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow, TrigFlow

TABLE = torch.cumprod(1 - torch.linspace(0.01, 0.2, 20, dtype=torch.float64), 0)
ZERO_TERMINAL = DiscreteVP(torch.cat([TABLE[:-1], torch.zeros(1, dtype=torch.float64)]))
SCHEDULES = {
    "discrete": DiscreteVP(TABLE),
    "zero_terminal": ZERO_TERMINAL,
    "edm": EDM(0.02, 20.0),
    "flow": RectifiedFlow(),
    "trig": TrigFlow(0.5),
}
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def draw(schedule, kind, low=0.1, high=0.9, n=5):
    """A perfect network's prediction of a known x0 and eps."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(n, 3, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    t = schedule.t_min + torch.linspace(low, high, n, dtype=torch.float64) * (schedule.t_max - schedule.t_min)
    parametrization, c = Parametrization(kind, sigma_data=0.7), schedule.at(t)
    x_t = add_noise(schedule, x0, eps, t)
    return x0, eps, t, Prediction(x_t, parametrization.target(x0, eps, c), c, parametrization)


def column(values):
    return values[:, None, None, None]


@EVERY_SCHEDULE
@EVERY_KIND
def test_every_quantity_from_every_kind(schedule, kind):
    x0, eps, t, prediction = draw(schedule, kind)
    alpha, sigma, d_alpha, d_sigma = (column(value) for value in schedule.at(t))
    torch.testing.assert_close(prediction.x_t, alpha * x0 + sigma * eps)
    expected = {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "flow": eps - x0,
        "velocity": d_alpha * x0 + d_sigma * eps,
        "score": -(prediction.x_t - alpha * x0) / sigma**2,
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(prediction, name), value, rtol=1e-8, atol=1e-8, msg=name)
    torch.testing.assert_close(prediction.combine(0.3, -2.0), 0.3 * x0 - 2 * eps, rtol=1e-8, atol=1e-8)


def test_velocity_is_the_derivative_of_the_path():
    for schedule in SCHEDULES.values():
        x0, eps, t, prediction = draw(schedule, "v_prediction", low=0.11, high=0.93)
        h = 1e-6
        slope = (add_noise(schedule, x0, eps, t + h) - add_noise(schedule, x0, eps, t - h)) / (2 * h)
        torch.testing.assert_close(prediction.velocity, slope, rtol=1e-6, atol=1e-6)


def test_edm_output_is_the_papers_f():
    """Karras et al. 2022, eq. 7: D = c_skip x + c_out F(c_in x), coefficients of table 1."""
    schedule, sd = SCHEDULES["edm"], 0.7
    x0, _, t, prediction = draw(schedule, "edm")
    sigma = column(t)
    c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2).sqrt()
    torch.testing.assert_close(c_skip * prediction.x_t + c_out * prediction.output, x0)
    scale = prediction.parametrization.input_scale(schedule.at(t))
    torch.testing.assert_close(scale, 1 / (t**2 + sd**2).sqrt())


def test_trigflow_output_is_the_papers_f():
    """Lu & Song 2025, eq. 5: dx/dt = sigma_data F(x / sigma_data), and f = cos(t) x - sin(t) sigma_data F."""
    schedule = TrigFlow(0.7)
    x0, _, t, prediction = draw(schedule, "trigflow")
    torch.testing.assert_close(prediction.velocity, 0.7 * prediction.output)
    torch.testing.assert_close(column(t.cos()) * prediction.x_t - column(t.sin()) * 0.7 * prediction.output, x0)
    torch.testing.assert_close(prediction.parametrization.input_scale(schedule.at(t)), torch.full_like(t, 1 / 0.7))


@EVERY_SCHEDULE
def test_what_is_predicted_directly_is_returned_itself(schedule):
    for kind, name in {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow": "flow"}.items():
        prediction = draw(schedule, kind)[-1]
        assert getattr(prediction, name) is prediction.output


def test_velocity_of_a_flow_is_the_output_to_the_bit():
    prediction = draw(SCHEDULES["flow"], "flow")[-1]
    assert torch.equal(prediction.velocity, prediction.output)


def test_quantities_are_solved_once():
    prediction = draw(SCHEDULES["edm"], "v_prediction")[-1]
    assert prediction.x0 is prediction.x0


def test_zero_terminal_snr_loses_x0_of_an_eps_network_but_not_of_a_v_network():
    with pytest.raises(ValueError, match="x0 at t=19"):
        Parametrization("epsilon").check(ZERO_TERMINAL)
    for kind in ("v_prediction", "sample", "flow", "edm"):
        Parametrization(kind).check(ZERO_TERMINAL)
    x0, _, _, prediction = draw(ZERO_TERMINAL, "v_prediction", low=1.0, high=1.0)
    torch.testing.assert_close(prediction.x0, x0)
    torch.testing.assert_close(prediction.x0, -prediction.output)


def test_check_asks_only_for_what_is_needed():
    for schedule in (ZERO_TERMINAL, SCHEDULES["flow"], SCHEDULES["trig"]):
        Parametrization("epsilon").check(schedule, needs=("eps",))
        with pytest.raises(ValueError, match="does not determine v"):
            Parametrization("epsilon").check(schedule, needs=("v",))
    for schedule in SCHEDULES.values():
        Parametrization("v_prediction").check(schedule, needs=("x0", "eps", "v", "flow"))
    Parametrization("epsilon").check(EDM(0.002, 80))
    with pytest.raises(ValueError, match="'score'"):
        Parametrization("epsilon").check(SCHEDULES["edm"], needs=("score",))


@pytest.mark.parametrize("arguments", [("noise",), ("edm", 0.0)])
def test_bad_parametrization_is_refused(arguments):
    with pytest.raises(ValueError):
        Parametrization(*arguments)


def test_time_is_a_number_or_one_per_sample():
    schedule = SCHEDULES["flow"]
    x0, eps, _, _ = draw(schedule, "flow")
    per_sample = add_noise(schedule, x0, eps, torch.full((5,), 0.3))
    for t in (0.3, torch.tensor(0.3, dtype=torch.float64), torch.full((5,), 0.3, dtype=torch.float64)):
        torch.testing.assert_close(add_noise(schedule, x0, eps, t), per_sample, rtol=1e-6, atol=1e-6)
    for t in (0.3, torch.tensor(0.3)):
        c = schedule.at(t)
        parametrization = Parametrization("v_prediction")
        x_t = add_noise(schedule, x0, eps, t)
        torch.testing.assert_close(Prediction(x_t, parametrization.target(x0, eps, c), c, parametrization).x0, x0)


def test_half_precision_is_rounded_once():
    schedule = SCHEDULES["discrete"]
    x0, eps, t, exact = draw(schedule, "epsilon")
    x_t, y = exact.x_t.bfloat16(), exact.output.bfloat16()
    rounded = Prediction(x_t, y, exact.coefficients, exact.parametrization)
    reference = Prediction(x_t.double(), y.double(), exact.coefficients, exact.parametrization)
    pairs = [(getattr(rounded, name), getattr(reference, name)) for name in ("x0", "v", "velocity", "score")]
    halves = (x0.bfloat16(), eps.bfloat16())
    noised = [add_noise(schedule, a, b, t) for a, b in (halves, [half.double() for half in halves])]
    for found, expected in (*pairs, noised):
        assert found.dtype == torch.bfloat16
        # float32 in between may still round the other way now and then; a rounded scalar would do so half the time.
        assert (found == expected.bfloat16()).double().mean() > 0.95


def test_gradients_reach_input_and_output():
    _, _, t, prediction = draw(SCHEDULES["discrete"], "epsilon")
    x_t, y = (value.clone().requires_grad_(True) for value in (prediction.x_t, prediction.output))
    Prediction(x_t, y, prediction.coefficients, prediction.parametrization).x0.sum().backward()
    c = SCHEDULES["discrete"].at(t)
    torch.testing.assert_close(x_t.grad, column(1 / c.alpha).expand_as(x_t))
    torch.testing.assert_close(y.grad, column(-c.sigma / c.alpha).expand_as(y))


def test_score_of_an_eps_network_survives_without_signal():
    """Only x0 is lost at alpha = 0: the score needs no solve."""
    c = ZERO_TERMINAL.at(torch.tensor([ZERO_TERMINAL.t_max]))
    y = torch.randn(1, 4, dtype=torch.float64)
    prediction = Prediction(torch.zeros_like(y), y, c, Parametrization("epsilon"))
    torch.testing.assert_close(prediction.score, -y)
    assert not math.isfinite(float(prediction.x0.abs().max()))


@EVERY_SCHEDULE
@EVERY_KIND
def test_a_shift_moves_the_noise_and_what_follows_from_it(schedule, kind):
    _, eps, _, prediction = draw(schedule, kind)
    delta = torch.linspace(-1, 1, eps.numel(), dtype=torch.float64).reshape(eps.shape)
    alpha, sigma = (column(value) for value in prediction.coefficients[:2])
    moved = prediction.shifted(delta)
    torch.testing.assert_close(moved.eps, eps + delta, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(moved.x0, prediction.x0 - sigma / alpha * delta, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("schedule", "kind"), [("flow", "flow"), ("zero_terminal", "v_prediction")])
def test_pure_noise_is_not_shifted(schedule, kind):
    _, eps, _, prediction = draw(SCHEDULES[schedule], kind, low=0.5, high=1.0)
    moved = prediction.shifted(torch.ones_like(eps))
    assert torch.equal(moved.output[-1], prediction.output[-1])
    torch.testing.assert_close(moved.eps[:-1], prediction.eps[:-1] + 1)


def test_parametrizations_are_shared_by_copies():
    parametrization = Parametrization("edm", 0.5)
    assert copy.deepcopy(parametrization) is parametrization
