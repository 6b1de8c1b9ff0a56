"""Distances between feature sets against closed forms, brute force and torchmetrics."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from sublimate.evaluation import fidelity as module
from sublimate.evaluation.fidelity import (
    extract,
    fidelity,
    frechet_distance,
    kernel_distance,
    precision_recall,
    real_versus_real,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean: torch.Tensor, covariance: torch.Tensor, n: int = 64) -> torch.Tensor:
    """A sample whose empirical mean and covariance are exactly these."""
    white = normal(n, len(mean))
    white = white - white.mean(dim=0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_with_diagonal_covariance():
    # For commuting covariances the distance is |difference of means|^2 + sum (sqrt a - sqrt b)^2.
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 0.25, 1.0]).double()
    m = torch.tensor([1.0, -2.0, 0.5]).double()
    measured = frechet_distance(with_moments(m, a.diag()), with_moments(torch.zeros(3).double(), b.diag()))
    assert measured == pytest.approx((m.square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item(), rel=1e-12)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    # In two dimensions tr (A B)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)).
    a = torch.tensor([[2.0, 0.8], [0.8, 1.0]]).double()
    b = torch.tensor([[1.0, -0.5], [-0.5, 3.0]]).double()
    cross = ((a @ b).trace() + 2 * torch.linalg.det(a @ b).sqrt()).sqrt()
    zero = torch.zeros(2).double()
    measured = frechet_distance(with_moments(zero, a), with_moments(zero, b))
    assert measured == pytest.approx((a.trace() + b.trace() - 2 * cross).item(), rel=1e-12)


def test_frechet_distance_is_zero_and_symmetric_for_flat_features():
    flat = normal(40, 2) @ normal(2, 5, seed=2)  # rank 2: round-off makes some eigenvalues negative
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-12)
    other = normal(40, 5, seed=1)
    assert frechet_distance(flat, other) == pytest.approx(frechet_distance(other, flat), rel=1e-12)


class Features(nn.Module):
    """Hands features through: torchmetrics takes a module that returns features, and its `num_features`."""

    num_features = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_frechet_distance_equals_torchmetrics():
    generated, reference = normal(200, 6) @ normal(6, 6, seed=2) + 0.3, normal(200, 6, seed=1)
    metric = FrechetInceptionDistance(feature=Features(), normalize=True)
    metric.update(reference, real=True)
    metric.update(generated, real=False)
    assert frechet_distance(generated, reference) == pytest.approx(metric.compute().item(), rel=1e-9)


def test_kernel_distance_equals_torchmetrics_and_does_not_depend_on_blocks(monkeypatch):
    generated, reference = normal(50, 6) + 0.3, normal(50, 6, seed=1)
    expected = poly_mmd(reference, generated).item()
    assert kernel_distance(generated, reference) == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert kernel_distance(generated, reference) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_is_unbiased():
    # Mean zero within four standard errors over 400 draws of ten; the biased estimator's mean is far above.
    draws = torch.tensor(
        [kernel_distance(normal(10, 4, seed=2 * s), normal(10, 4, seed=2 * s + 1)) for s in range(400)]
    )
    error = draws.std() / 400**0.5
    assert abs(draws.mean()) < 4 * error
    assert (draws < 0).any()
    biased = 2 * ((4 / 4 + 1) ** 3 - 1) / 10  # at least this much would the diagonal add
    assert biased > 20 * error


def brute_force(samples: torch.Tensor, manifold: torch.Tensor, k: int) -> float:
    covered = 0
    for sample in samples.tolist():
        for point in manifold.tolist():
            near = sorted(sum((p - q) ** 2 for p, q in zip(point, other, strict=True)) for other in manifold.tolist())
            if sum((p - q) ** 2 for p, q in zip(point, sample, strict=True)) <= near[k]:
                covered += 1
                break
    return covered / len(samples)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_brute_force(k, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 7)
    generated, reference = 0.6 * normal(20, 2), normal(24, 2, seed=1)
    precision, recall = precision_recall(generated, reference, k=k)
    assert precision == brute_force(generated, reference, k)
    assert recall == brute_force(reference, generated, k)
    assert precision > recall  # a narrow generator is precise and forgets the tails


def test_precision_and_recall_do_not_depend_on_the_origin():
    generated, reference = 0.6 * normal(40, 2), normal(40, 2, seed=1)
    assert precision_recall(generated + 2.0**26, reference + 2.0**26) == precision_recall(generated, reference)


def test_a_copied_sample_is_covered_by_its_own_copies():
    copies = torch.zeros(5, 2).double()
    assert precision_recall(copies, copies.clone()) == (1.0, 1.0)


def test_precision_and_recall_at_the_edges():
    points = normal(30, 40)
    assert precision_recall(points, points.clone()) == (1.0, 1.0)
    assert precision_recall(points, points + 100) == (0.0, 0.0)
    with pytest.raises(ValueError, match="k is 30"):
        precision_recall(points, points, k=30)


def test_a_collapsed_generator_is_precise_and_has_no_recall():
    reference = normal(200, 3)
    scores = fidelity(reference[:1] + 1e-9 * normal(200, 3, seed=1), reference)
    assert scores.precision == 1.0 and scores.recall < 0.02 and scores.fid > 1


def test_extract_is_batched_and_checked():
    images = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    calls = []

    def pooled(batch: torch.Tensor) -> torch.Tensor:
        calls.append(len(batch))
        return batch.mean(dim=(2, 3))

    features = extract(pooled, images.requires_grad_(), batch_size=4)
    assert calls == [4, 4, 2]
    assert features.dtype == torch.float64 and not features.requires_grad
    assert torch.equal(features, images.detach().mean(dim=(2, 3)).double())
    with pytest.raises(ValueError, match=r"returned shape \(10, 3, 4, 4\) for 10 images"):
        extract(lambda batch: batch, images)


@pytest.mark.parametrize(
    ("generated", "reference", "sentence"),
    [
        (normal(20, 4), normal(21, 4), "20 generated and 21 reference samples"),
        (normal(4, 4), normal(4, 4), "give more than 4 images"),
        (normal(20, 4), normal(20, 5), "4 and 5 dimensions"),
        (normal(20, 4) / 0, normal(20, 4), "generated features contain values that are not finite"),
        (normal(20), normal(20), r"shape \(20,\)"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(generated, reference, sentence):
    with pytest.raises(ValueError, match=sentence):
        fidelity(generated, reference)


def test_real_versus_real_draws_disjoint_halves():
    features = torch.arange(40).double()[:, None]
    floor = real_versus_real(features, 20, k=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert floor == fidelity(features[order[:20]], features[order[20:]], k=1)
    assert floor.n == 20 and floor != real_versus_real(features, 20, seed=1, k=1)
    with pytest.raises(ValueError, match="need 42 reference features, got 40"):
        real_versus_real(features, 21)
