"""Ink's detector: shaped like any detector, steady from batch to batch, and the same after a trip through a file."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from sublimate.training.ink.corruptions import IGNORED
from sublimate.training.ink.detector import InkDetector, detector_loss, worn
from sublimate.training.ink.vocabulary import GROUPS
from sublimate.training.ink.world import sample


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return InkDetector()


@pytest.fixture(scope="module")
def images():
    return sample(range(6))[0]


def test_every_group_gets_probabilities_with_a_reject_class(detector, images):
    assert detector.groups == GROUPS
    probabilities = detector(images)
    assert {name: p.shape[1] for name, p in probabilities.items()} == {"digit": 11, "ink": 7, "style": 5}
    for p in probabilities.values():
        torch.testing.assert_close(p.sum(dim=1), torch.ones(6))
        assert p.min() >= 0


def test_it_stays_small(detector):
    assert sum(p.numel() for p in detector.parameters()) <= 350_000


def test_features_are_what_the_heads_read(detector, images):
    features = detector.features(images)
    assert features.shape == (6, detector.feature_dim)
    for name, head in detector.heads.items():
        torch.testing.assert_close(head(features).softmax(dim=1), detector(images)[name])


def test_neither_the_mode_nor_the_batch_changes_a_reading(detector, images):
    together = detector.train()(images)["digit"]
    torch.testing.assert_close(detector.eval()(images[2:3])["digit"], together[2:3])


def test_it_is_differentiable_in_the_images(detector, images):
    leaf = images.clone().requires_grad_()
    detector(leaf)["digit"][:, 7].sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_other_shapes_are_refused(detector):
    with pytest.raises(ValueError, match=r"\(2, 3, 64, 64\)"):
        detector(torch.zeros(2, 3, 64, 64))


def test_a_file_gives_the_same_detector_back(detector, images, tmp_path):
    detector.save(tmp_path / "detector.safetensors")
    loaded = InkDetector.load(tmp_path / "detector.safetensors")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for name, p in detector(images).items():
        assert torch.equal(loaded(images)[name], p)


def test_files_of_something_else_are_refused(detector, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a detector of Ink"):
        InkDetector.load(path)
    metadata = {"kind": "sublimate.ink.detector", "width": "32", "groups": json.dumps({"digit": ["zero"]})}
    save_file(detector.state_dict(), path, metadata)
    with pytest.raises(ValueError, match="not those of this version"):
        InkDetector.load(path)


def test_the_loss_averages_each_group_over_what_its_targets_say():
    logits = {name: torch.randn(4, len(labels) + 1) for name, labels in GROUPS.items()}
    targets = torch.tensor([[7, 0, 3], [10, 6, IGNORED], [10, IGNORED, IGNORED], [1, 2, IGNORED]])
    expected = (
        F.cross_entropy(logits["digit"], targets[:, 0])
        + F.cross_entropy(logits["ink"][[0, 1, 3]], targets[[0, 1, 3], 1])
        + F.cross_entropy(logits["style"][:1], targets[:1, 2])
    )
    torch.testing.assert_close(detector_loss(logits, targets), expected)
    targets[:, 2] = IGNORED
    assert detector_loss(logits, targets).isfinite()
    with pytest.raises(ValueError, match="one column per group"):
        detector_loss(logits, targets[:, :2])


def test_wear_is_bounded_and_may_be_none(images):
    none = torch.tensor([[0.0, 0.0, 0.75]]).expand(6, 3)
    torch.testing.assert_close(worn(images, none, torch.randn_like(images)), images)
    soft = worn(images, torch.tensor([[1.0, 0.0, 0.75]]).expand(6, 3), torch.randn_like(images))
    torch.testing.assert_close(soft[..., 1:-1, 1:-1], F.avg_pool2d(images, 3, stride=1))
    heavy = worn(images, torch.ones(6, 3), torch.randn_like(images))
    assert heavy.min() >= 0 and heavy.max() <= 1
    assert (heavy - images).abs().mean() > 0.02
