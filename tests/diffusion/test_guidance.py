"""Guidance: one convention, in every quantity, with scales per sample."""

import pytest
import torch
from torch import nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.predictions import Parametrization
from sublimate.diffusion.schedules import RectifiedFlow

NULL = Condition(text=torch.zeros(1))
T = torch.tensor([0.2, 0.5, 0.9])


class Tone(nn.Module):
    """y = sin(3 x t + text), sample by sample, so that batches do not change rounding."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x, t, text):
        self.batches.append(len(x))
        return (3 * x * (t[:, None] / 1000).to(x.dtype) + text[:, None].to(x.dtype)).sin()


def call(network, x, t, condition, features):
    y = network(x, t, condition["text"])
    return y, {name: condition["text"] for name in features}


@pytest.fixture
def denoiser():
    return Denoiser(Tone(), call, RectifiedFlow(), Parametrization("flow"))


@pytest.fixture
def x():
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def condition():
    return Condition(text=torch.tensor([1.0, 2.0, 3.0]), extra=torch.zeros(3, 2))


@pytest.mark.parametrize("scale", [1, 1.0])
def test_scale_one_is_the_plain_prediction_itself(denoiser, x, condition, scale):
    returned = []
    denoiser.register_forward_hook(lambda module, inputs, output: returned.append(output))
    prediction = guided(denoiser, x, T, condition, NULL, scale)
    assert prediction is returned[0] and denoiser.network.batches == [3]


def test_extrapolation_holds_in_every_quantity(denoiser, x, condition):
    scale = 2.5
    found = guided(denoiser, x, T, condition, NULL, scale)
    assert denoiser.network.batches == [6]
    cond, null = denoiser(x, T, condition), denoiser(x, T, condition.with_null(NULL))
    for name in ("output", "x0", "eps", "v", "velocity", "score"):
        low, high = getattr(null, name), getattr(cond, name)
        torch.testing.assert_close(getattr(found, name), low + scale * (high - low), rtol=1e-4, atol=1e-4)
    assert found.x_t is x


def test_scales_per_sample(denoiser, x, condition):
    scales = torch.tensor([1.0, 3.0, 0.0])
    found = guided(denoiser, x, T, condition, NULL, scales)
    for i, scale in enumerate(scales.tolist()):
        alone = guided(denoiser, x[i : i + 1], T[i : i + 1], condition.index(i), NULL, scale)
        torch.testing.assert_close(found.x0[i], alone.x0[0])
    # The ends are exact: 1 is the conditional output, 0 the null one.
    assert torch.equal(found.output[0], denoiser(x, T, condition).output[0])
    assert torch.equal(found.output[2], denoiser(x, T, condition.with_null(NULL)).output[2])


@pytest.mark.parametrize("t", [0.5, torch.tensor(0.5)])
def test_one_time_for_all_and_a_condition_of_one(denoiser, x, t):
    one = Condition(text=torch.tensor([2.0]))
    found = guided(denoiser, x, t, one, NULL, 3.0)
    expected = guided(denoiser, x, torch.full((3,), 0.5), one.expand(3), NULL.expand(3), torch.full((3,), 3.0))
    torch.testing.assert_close(found.x0, expected.x0)
    torch.testing.assert_close(found.velocity, expected.velocity)


def test_features_are_those_of_the_condition(denoiser, x, condition):
    for scale in (1.0, 4.0):
        found = guided(denoiser, x, T, condition, NULL, scale, features=("text",))
        assert torch.equal(found.features["text"], condition["text"])


def test_unconditional_networks_cannot_be_guided(denoiser, x):
    with pytest.raises(ValueError, match="null condition"):
        guided(denoiser, x, T, Condition(), Condition(), 2.0)


def test_half_precision_stays_half(denoiser, x, condition):
    found = guided(denoiser, x.bfloat16(), T, condition, NULL, 7.3)
    assert found.output.dtype == found.x0.dtype == torch.bfloat16
