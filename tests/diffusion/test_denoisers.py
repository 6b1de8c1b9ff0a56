"""Denoisers: what the network is told, copies that share, and no stall of a GPU."""

import copy

import diffusers
import pytest
import torch
from torch import nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.predictions import Parametrization
from sublimate.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow, TrigFlow

TABLE = torch.cumprod(1 - torch.linspace(0.01, 0.2, 20, dtype=torch.float64), 0)


class Recorder(nn.Module):
    """A small network that keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
        self.seen = []

    def forward(self, x, t, text):
        self.seen.append((x, t, text))
        shape = (-1,) + (1,) * (x.ndim - 1)
        y = (self.weight[0] * x + (self.weight[1] * t.reshape(shape)).sin()) * (1 + text.reshape(shape))
        return y.to(x.dtype)


def call(network, x, t, condition, features):
    text = condition.get("text", torch.zeros(len(x), dtype=x.dtype, device=x.device))
    y = network(x, t, text)
    return y, {name: y * 2 for name in features}


def make(schedule, kind="v_prediction"):
    return Denoiser(Recorder(), call, schedule, Parametrization(kind, sigma_data=0.5))


def test_network_is_told_time_input_and_condition():
    denoiser = make(EDM(0.002, 80), "edm")
    x, sigma = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    prediction = denoiser(x, sigma, Condition(text=torch.ones(1)), features=("mid",))
    seen_x, seen_t, seen_text = denoiser.network.seen[0]
    scheduler = diffusers.EDMEulerScheduler()
    column = sigma[:, None, None, None]
    torch.testing.assert_close(seen_x, scheduler.precondition_inputs(x, column))
    assert seen_t.dtype == torch.float32
    torch.testing.assert_close(seen_t, scheduler.precondition_noise(sigma).float())
    assert torch.equal(seen_text, torch.ones(3))
    torch.testing.assert_close(prediction.x0, scheduler.precondition_outputs(x, prediction.output, column))
    assert torch.equal(prediction.features["mid"], prediction.output * 2)
    assert prediction.x_t is x


def test_unscaled_input_is_passed_as_it_is():
    denoiser = make(DiscreteVP(TABLE))
    x = torch.randn(2, 3)
    denoiser(x, 7)
    assert denoiser.network.seen[0][0] is x
    assert torch.equal(denoiser.network.seen[0][1], torch.tensor([7.0, 7.0]))


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [(DiscreteVP(TABLE), "epsilon"), (EDM(), "edm"), (RectifiedFlow(), "flow"), (TrigFlow(0.5), "trigflow")],
    ids=["discrete", "edm", "flow", "trig"],
)
def test_every_form_of_time_is_the_same(schedule, kind):
    denoiser, x, t = make(schedule, kind), torch.randn(3, 5, dtype=torch.float64), 0.7
    expected = denoiser(x, torch.full((3,), t, dtype=torch.float64))
    for form in (t, torch.tensor(t, dtype=torch.float64)):
        found = denoiser(x, form)
        torch.testing.assert_close(found.x0, expected.x0)
        torch.testing.assert_close(found.velocity, expected.velocity)


def test_undetermined_output_is_refused_when_built():
    with pytest.raises(ValueError, match="does not determine x0"):
        make(RectifiedFlow(), "epsilon")


def test_condition_of_another_batch_is_refused():
    with pytest.raises(ValueError, match="batch size 2"):
        make(EDM())(torch.zeros(3, 1), 1.0, Condition(text=torch.zeros(2)))


class Family:
    """Holds a network call as a method, as backbones do."""

    def call(self, network, x, t, condition, features):
        return call(network, x, t, condition, features)


def test_copy_owns_its_network_and_shares_the_rest():
    denoiser = Denoiser(Recorder(), Family().call, EDM(), Parametrization("edm", 0.5)).eval()
    denoiser.network.requires_grad_(False)
    twin = copy.deepcopy(denoiser)
    assert twin.network is not denoiser.network
    assert twin.network.weight.data_ptr() != denoiser.network.weight.data_ptr()
    assert not twin.training and not twin.network.weight.requires_grad
    assert twin.schedule is denoiser.schedule and twin.parametrization is denoiser.parametrization
    assert twin.call.__self__ is denoiser.call.__self__
    assert twin.state_dict().keys() == denoiser.state_dict().keys()


def test_copy_respects_a_memo():
    """Trees that share a frozen base are made this way."""
    denoiser = make(EDM())
    weight = denoiser.network.weight
    twin = copy.deepcopy(denoiser, {id(weight): weight})
    assert twin.network.weight is weight and twin.network is not denoiser.network
    # A network that refers back to its denoiser, as hooks do.
    denoiser.network.owner = [denoiser]
    twin = copy.deepcopy(denoiser)
    assert twin.network.owner[0] is twin


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "kind"),
    [(DiscreteVP(TABLE), "epsilon"), (EDM(), "edm"), (RectifiedFlow(3.0), "flow"), (TrigFlow(0.5), "trigflow")],
    ids=["discrete", "edm", "flow", "trig"],
)
def test_nothing_is_read_back_from_the_device(schedule, kind):
    """Meta tensors have no values: any .item(), comparison or boolean of one raises, as it would stall a GPU."""
    denoiser = make(schedule, kind).to("meta")
    x, condition = torch.empty(2, 3, device="meta"), Condition(text=torch.empty(2, device="meta"))
    null = Condition(text=torch.empty(1, device="meta"))
    scale = torch.empty(2, device="meta")
    for t in (0.5, torch.empty((), device="meta"), torch.empty(2, device="meta")):
        predictions = [denoiser(x, t, condition), guided(denoiser, x, t, condition, null, scale)]
        predictions.append(guided(denoiser, x, t, condition, null, 3.0))
        for prediction in predictions:
            for name in ("x0", "eps", "v", "flow", "velocity", "score"):
                assert getattr(prediction, name).device.type == "meta"
    assert schedule.uniform_time(torch.empty(4, device="meta")).device.type == "meta"
    assert schedule.t_at_log_snr(schedule.log_snr(torch.empty(4, device="meta"))).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_stalls_a_gpu():
    schedule = DiscreteVP(TABLE)
    denoiser = make(schedule).to("cuda")
    x, t = torch.randn(2, 3, device="cuda"), torch.tensor([3.0, 7.5], device="cuda")
    condition, null = Condition(text=torch.ones(2, device="cuda")), Condition(text=torch.zeros(1, device="cuda"))
    denoiser(x, t, condition)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for time in (t, 3.0):
            prediction = guided(denoiser, x, time, condition, null, 3.0)
            values = [prediction.x0, prediction.eps, prediction.velocity, prediction.score]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite().all() for value in values)


def test_derivative_in_time_reaches_the_prediction():
    """Consistency and mean-flow objectives differentiate x0 along the path."""
    for schedule, kind in ((DiscreteVP(TABLE), "epsilon"), (TrigFlow(0.5), "trigflow")):
        denoiser = make(schedule, kind)
        # Float64 throughout: the time told to the network is float32, too coarse for finite differences.
        denoiser.call = lambda network, x, t, condition, features: ((network.weight[0] * x).tanh(), {})
        x, dx = (torch.randn(2, 3, dtype=torch.float64) for _ in range(2))
        t, dt = torch.tensor([0.6, 1.2], dtype=torch.float64), torch.tensor([0.7, -0.4], dtype=torch.float64)
        _, slope = torch.func.jvp(lambda x, t, d=denoiser: d(x, t).x0, (x, t), (dx, dt))
        h = 1e-6
        difference = (denoiser(x + h * dx, t + h * dt).x0 - denoiser(x - h * dx, t - h * dt).x0) / (2 * h)
        torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-7)
