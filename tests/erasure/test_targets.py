"""ESD's targets and keep terms on a linear denoiser, where everything can be written down by hand."""

import pytest
import torch
from torch import nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.predictions import Parametrization
from sublimate.diffusion.schedules import DiscreteVP
from sublimate.erasure import keep, targets

SCHEDULE = DiscreteVP(torch.linspace(0.9999, 0.01, 1000, dtype=torch.float64))
NULL = Condition(text=torch.zeros(1, 3))
CONCEPT = Condition(text=torch.tensor([[1.0, -2.0, 0.5]]))
ANCHOR = Condition(text=torch.tensor([[0.3, 0.1, -1.0]]))
T = torch.tensor([100.0, 900.0])


class Linear(nn.Module):
    """y = A x + B c."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.b = nn.Parameter(torch.randn(4, 3, generator=generator))

    def forward(self, x, c):
        return x @ self.a.T + c @ self.b.T


def call(network, x, t, condition, features):
    return network(x, condition["text"]), {}


def linear(seed=0, kind="v_prediction"):
    return Denoiser(Linear(seed), call, SCHEDULE, Parametrization(kind))


def x_t():
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(7))


def mean_square(difference):
    return difference.square().mean(1)


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.5])
def test_esd_target_by_hand(eta):
    denoiser, x = linear(), x_t()
    target = targets.negative_guidance(denoiser(x, T, NULL), denoiser(x, T, CONCEPT), eta)
    network = denoiser.network
    torch.testing.assert_close(target.output, x @ network.a.T - eta * CONCEPT["text"] @ network.b.T)


def test_rewrite_counts_eta_one_higher():
    denoiser, x = linear(), x_t()
    null, concept = denoiser(x, T, NULL), denoiser(x, T, CONCEPT)
    # The rewrite without erase_from is the rewrite with erase_from = erase.
    rewrite = targets.within(concept, concept, null, 2.0)
    paper = targets.negative_guidance(null, concept, targets.paper_eta(2.0))
    torch.testing.assert_close(rewrite.output, paper.output)
    assert not torch.allclose(rewrite.output, targets.negative_guidance(null, concept, 2.0).output)


def test_within_takes_the_guidance_of_the_concept_out_of_the_context():
    denoiser, x = linear(), x_t()
    context, concept, null = (denoiser(x, T, c) for c in (ANCHOR, CONCEPT, NULL))
    expected = x @ denoiser.network.a.T + (ANCHOR["text"] - 0.7 * CONCEPT["text"]) @ denoiser.network.b.T
    torch.testing.assert_close(targets.within(context, concept, null, 0.7).output, expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_spaces_differ_by_the_noise_level(kind):
    student, target = linear(0, kind)(x_t(), T, CONCEPT), linear(1, kind)(x_t(), T, CONCEPT)
    alpha, sigma = SCHEDULE.at(T)[:2]
    eps = targets.squared_error(student, target, "eps")
    torch.testing.assert_close(targets.squared_error(student, target, "v"), eps / alpha.float() ** 2)
    torch.testing.assert_close(targets.squared_error(student, target, "x0"), eps * (sigma / alpha).float() ** 2)
    own = {"epsilon": "eps", "v_prediction": "v"}[kind]
    torch.testing.assert_close(
        targets.squared_error(student, target), targets.squared_error(student, target, own), rtol=0, atol=0
    )


def test_targets_carry_no_gradient():
    student, frozen = linear(0), linear(1)
    x = x_t()
    targets.squared_error(student(x, T, CONCEPT), frozen(x, T, CONCEPT)).sum().backward()
    assert student.network.b.grad is not None
    assert frozen.network.b.grad is None


@pytest.mark.parametrize("detach_null", [False, True])
def test_guidance_error_by_hand(detach_null):
    student, frozen, x = linear(0), linear(1), x_t()
    u, n, a, n0 = (d(x, T, c) for d, c in ((student, CONCEPT), (student, NULL), (frozen, ANCHOR), (frozen, NULL)))
    error = targets.guidance_error(u, n, a, n0, detach_null=detach_null)
    guidance = CONCEPT["text"] @ student.network.b.T - ANCHOR["text"] @ frozen.network.b.T
    torch.testing.assert_close(error, mean_square(guidance).expand(2))
    error.sum().backward()
    # A moves both branches alike, so it gets a gradient only through a detached null branch.
    assert (student.network.a.grad.abs().max() > 1e-3) == detach_null
    assert frozen.network.a.grad is None and frozen.network.b.grad is None


def test_frozen_error_pins_a_branch():
    student, frozen, x = linear(0), linear(1), x_t()
    error = keep.frozen_error(student, frozen, x, T, NULL)
    torch.testing.assert_close(error, mean_square(x @ (student.network.a - frozen.network.a).T))
    error.sum().backward()
    assert frozen.network.a.grad is None
    assert keep.frozen_error(student, student, x, T, NULL, "eps").abs().max() == 0


def test_l1_drift_by_hand():
    trained = {"a": nn.Parameter(torch.tensor([1.0, -2.0])), "b": nn.Parameter(torch.tensor([[3.0]]))}
    originals = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([[3.5]]), "other": torch.zeros(9)}
    drift = keep.l1_drift(trained, originals)
    drift.backward()
    assert drift.item() == pytest.approx((1 + 3 + 0.5) / 3)
    assert trained["a"].grad.tolist() == pytest.approx([1 / 3, -1 / 3])
