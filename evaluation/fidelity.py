"""How close generated images are to reference images: FID, KID, precision and recall on any feature extractor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sublimate.pipelines.placement import brought_to

Extractor = Callable[[Tensor], Tensor]
_BLOCK = 1024  # rows of a pairwise matrix held at once: 1024 x 5000 float64 are 40 MB


@dataclass(frozen=True)
class Fidelity:
    """Distances between two equally large sets of features.

    Attributes:
        fid: Frechet distance, lower is closer; biased upwards by O(1/n), so compare it only at the same n.
        kid: kernel distance, lower is closer; unbiased, so it may be slightly negative for equal distributions.
        precision: share of generated samples inside the reference manifold, in [0, 1].
        recall: share of reference samples inside the generated manifold, in [0, 1].
        n: samples in each set.
    """

    fid: float
    kid: float
    precision: float
    recall: float
    n: int

    def __str__(self) -> str:
        return (
            f"FID {self.fid:.3f}, KID {1000 * self.kid:.3f}e-3, precision {100 * self.precision:.1f} %, "
            f"recall {100 * self.recall:.1f} %, n={self.n}"
        )


@torch.no_grad()
def extract(extractor: Extractor, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Features of many images, a batch at a time, without gradients.

    Args:
        extractor: maps images (B, 3, H, W) in [0, 1] to features (B, D); a module must already be in eval mode.
        images: (N, 3, H, W) in [0, 1], on any device if the extractor is a module, or a method of one.
        batch_size: images per call.

    Returns:
        (N, D) in float64 on the CPU.

    Raises:
        ValueError: if the extractor does not give one row per image.
    """
    rows = []
    for batch in images.split(batch_size):
        features = extractor(brought_to(extractor, batch))
        if features.ndim != 2 or len(features) != len(batch):
            raise ValueError(
                f"the feature extractor returned shape {tuple(features.shape)} for {len(batch)} images; "
                f"it must return ({len(batch)}, D), so pool or flatten its output"
            )
        rows.append(features.to("cpu", torch.float64))
    return torch.cat(rows)


def frechet_distance(generated: Tensor, reference: Tensor) -> float:
    """The Frechet distance between Gaussians fitted to two sets of features.

    Args:
        generated: features (n, D).
        reference: features (m, D).

    Returns:
        The squared distance (what the literature calls FID when the features are Inception's).

    Source: Heusel et al. 2017 (arXiv 1706.08500), equation 6.
    """
    mean, reference_mean = generated.mean(dim=0), reference.mean(dim=0)
    root, reference_root = _covariance_root(generated), _covariance_root(reference)
    # Eq. 6: |m - m_w|^2 + tr(C + C_w - 2 (C C_w)^(1/2)). The eigenvalues of C C_w are the squared singular values of
    # the product of the two symmetric roots, so the trace is that product's nuclear norm: real and never negative.
    cross = torch.linalg.svdvals(root @ reference_root).sum()
    distance = (mean - reference_mean).square().sum() + root.square().sum() + reference_root.square().sum() - 2 * cross
    return distance.item()


def _covariance_root(features: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(torch.cov(features.T).reshape(features.shape[1], -1))
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def kernel_distance(generated: Tensor, reference: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy under the cubic kernel (x.y / D + 1)^3.

    It is computed on all samples at once instead of averaged over random subsets: the same expectation, less variance,
    and the same number every time.

    Args:
        generated: features (n, D).
        reference: features (m, D).

    Returns:
        The squared discrepancy; its expectation is zero when both sets have one distribution.

    Source: Binkowski et al. 2018 (arXiv 1801.01401), section 4; estimator: Gretton et al. 2012, equation 3.
    """
    n, m = len(generated), len(reference)
    # Gretton eq. 3: mean of k over distinct pairs of each set, minus twice the mean over pairs across the sets.
    within = (_kernel_sum(generated, generated) - _kernel_diagonal(generated)) / (n * (n - 1))
    within_reference = (_kernel_sum(reference, reference) - _kernel_diagonal(reference)) / (m * (m - 1))
    return within + within_reference - 2 * _kernel_sum(generated, reference) / (n * m)


def _kernel_sum(rows: Tensor, columns: Tensor) -> float:
    blocks = rows.split(_BLOCK)
    return sum((block @ columns.T / rows.shape[1] + 1).pow(3).sum().item() for block in blocks)


def _kernel_diagonal(features: Tensor) -> float:
    return (features.square().sum(dim=1) / features.shape[1] + 1).pow(3).sum().item()


def precision_recall(generated: Tensor, reference: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall: how much of each set lies in the other's k-nearest-neighbour manifold.

    Args:
        generated: features (n, D), n > k.
        reference: features (m, D), m > k.
        k: neighbours that set the radius of each sample's ball.

    Returns:
        Precision (fidelity) and recall (coverage), each in [0, 1].

    Raises:
        ValueError: if a set has no k-th neighbour.

    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991), equations 1 and 2; k = 3 is theirs.
    """
    if not 1 <= k < min(len(generated), len(reference)):
        raise ValueError(f"k is {k}; it must be at least 1 and below the number of samples in each set")
    return _covered(generated, reference, k), _covered(reference, generated, k)


def _covered(samples: Tensor, manifold: Tensor, k: int) -> float:
    """Eq. 1 and 2: the share of `samples` that lie in the ball of at least one point of `manifold`."""
    radii = torch.cat([block.kthvalue(k + 1, dim=1).values for block in _distances(manifold, manifold)])
    inside = [(block <= radii).any(dim=1) for block in _distances(samples, manifold)]
    return torch.cat(inside).double().mean().item()


def _distances(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    # By matrix products, ten times as fast; they lose small distances of points far from the origin.
    products, middle = "use_mm_for_euclid_dist", columns.mean(dim=0)
    return (torch.cdist(block - middle, columns - middle, compute_mode=products) for block in rows.split(_BLOCK))


def fidelity(generated: Tensor, reference: Tensor, *, k: int = 3) -> Fidelity:
    """All distances between generated and reference features.

    Args:
        generated: features (n, D).
        reference: features (n, D); as many as generated, because the Frechet distance is biased by O(1/n).
        k: neighbours for precision and recall.

    Returns:
        The distances, computed in float64.

    Raises:
        ValueError: for sets of different size, for n <= D (the covariance would be singular), or features that are
            not finite.
    """
    for name, features in (("generated", generated), ("reference", reference)):
        if features.ndim != 2:
            raise ValueError(f"{name} features have shape {tuple(features.shape)}; give (n, D), see extract()")
        if not features.isfinite().all():
            raise ValueError(f"{name} features contain values that are not finite; check the images they came from")
    (n, dimension), (m, other) = generated.shape, reference.shape
    if dimension != other:
        raise ValueError(f"features have {dimension} and {other} dimensions; use one extractor for both sets")
    if n != m:
        raise ValueError(
            f"{n} generated and {m} reference samples: the Frechet distance depends on n, so give equally many"
        )
    if n <= dimension:
        raise ValueError(
            f"{n} samples cannot fit a covariance of {dimension} features; give more than {dimension} images "
            "or a smaller feature extractor"
        )
    generated, reference = generated.double(), reference.double()
    precision, recall = precision_recall(generated, reference, k=k)
    return Fidelity(
        fid=frechet_distance(generated, reference),
        kid=kernel_distance(generated, reference),
        precision=precision,
        recall=recall,
        n=n,
    )


def real_versus_real(features: Tensor, n: int, *, seed: int = 0, k: int = 3) -> Fidelity:
    """The floor: what two disjoint random draws of the *reference* score against each other at the same n.

    Args:
        features: reference features (N, D), N >= 2 n.
        n: samples per draw; the n of the numbers this floor stands beside.
        seed: of the draw.
        k: neighbours for precision and recall.

    Returns:
        The distances a perfect generator would show at this n.

    Raises:
        ValueError: if there are too few features for two disjoint draws, and as in `fidelity`.
    """
    if len(features) < 2 * n:
        raise ValueError(f"two disjoint draws of {n} need {2 * n} reference features, got {len(features)}")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return fidelity(features[order[:n]], features[order[n : 2 * n]], k=k)
