"""What a map of side effects finds where each label has a direction of its own."""

import pytest
import torch

from sublimate.evaluation.agreement import Readings
from sublimate.evaluation.blindspots import _name, blindspots
from sublimate.training.sparse_autoencoder import SparseAutoencoderConfig

GROUP_LABELS = ("digit two", "ink red", "ink blue", "ink green")
CONFIG = SparseAutoencoderConfig(expansion=2, k=2, aux_k=8, learning_rate=1e-2)
GROUPS = {"digit": ("one", "two", "seven"), "ink": ("red", "blue", "green")}
DIRECTIONS = torch.linalg.qr(torch.randn(8, 6, generator=torch.Generator().manual_seed(0))).Q.T


def seen(choices):
    return Readings(GROUPS, {group: torch.tensor(column) for group, column in zip(GROUPS, choices, strict=True)})


def features(digits, inks, seed):
    """One direction per label, strengths between 1 and 2, a little noise."""
    generator = torch.Generator().manual_seed(seed)
    strengths = 1 + torch.rand(2, len(digits), 1, generator=generator)
    shown = strengths[0] * DIRECTIONS[digits] + strengths[1] * DIRECTIONS[3 + torch.tensor(inks)]
    return shown + 0.02 * torch.randn(shown.shape, generator=generator)


@pytest.fixture(scope="module")
def atoms():
    """Sevens became ones; nothing else changed."""
    digits, inks = [i % 3 for i in range(900)], [i // 3 % 3 for i in range(900)]
    after = [0 if digit == 2 else digit for digit in digits]
    before_features, after_features = features(digits, inks, 1), features(after, inks, 1)
    readings = seen((digits, inks)), seen((after, inks))
    return blindspots(before_features, after_features, *readings, config=CONFIG, steps=400)


def strongest(atoms, shows):
    return max((atom for atom in atoms if atom.shows == shows), key=lambda atom: atom.before + atom.after)


@pytest.mark.slow
def test_what_is_gone_is_suppressed_and_what_took_its_place_exaggerated(atoms):
    seven, one = strongest(atoms, "digit seven"), strongest(atoms, "digit one")
    assert seven.ratio < 0.1 and seven.high < 0.5 and seven.moved
    assert one.ratio > 0.6 and one.low > 0.5 and one.moved
    assert seven.share > 0.9


@pytest.mark.slow
def test_what_stayed_moved_far_less(atoms):
    stayed = [strongest(atoms, label) for label in GROUP_LABELS if any(a.shows == label for a in atoms)]
    assert len(stayed) >= 3
    for atom in stayed:
        assert abs(atom.ratio - 0.5) < 0.2 and atom.low <= atom.ratio <= atom.high


@pytest.mark.slow
def test_the_farthest_come_first_and_intervals_hold_their_ratio(atoms):
    apart = [max(atom.low - 0.5, 0.5 - atom.high) for atom in atoms]
    assert apart == sorted(apart, reverse=True)
    assert all(atom.low <= atom.ratio <= atom.high for atom in atoms)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 9, 13, 14, 19])
def test_other_images_of_the_same_kind_have_moved_nowhere(seed):
    """Of many directions some lie beyond intervals of their own by chance; all at once, hardly ever."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [[torch.randint(3, (200,), generator=generator).tolist() for _ in range(2)] for _ in range(2)]
    before, after = (features(*labels, seed=10 * seed + i) for i, labels in enumerate(drawn))
    found = blindspots(before, after, *map(seen, drawn), config=CONFIG, steps=200, seed=seed)
    assert len(found) > 5 and not any(atom.moved for atom in found)


def test_an_atom_is_named_by_the_images_that_have_it():
    code = torch.zeros(100)
    code[[3, 7]] = 1.0
    labels = [["digit seven" if i in (3, 7) else "digit one"] for i in range(100)]
    assert _name(code, labels) == ("digit seven", 1.0)


def test_the_same_images_have_moved_nowhere():
    digits, inks = [i % 3 for i in range(90)], [i % 2 for i in range(90)]
    same, reading = features(digits, inks, 1), seen((digits, inks))
    assert not any(atom.moved for atom in blindspots(same, same, reading, reading, steps=30))


def test_images_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        blindspots(torch.zeros(3, 8), torch.zeros(2, 8), seen(([0] * 3, [0] * 3)), seen(([0] * 2, [0] * 2)))
