"""Side effects that nobody listed: features of images that a sparse autoencoder tells apart, base against edited."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.evaluation.agreement import Readings
from sublimate.pipelines.sparse_autoencoder import SparseAutoencoder
from sublimate.training.objective import Batch
from sublimate.training.randomness import SampleRandom, key
from sublimate.training.sparse_autoencoder import SparseAutoencoderConfig, SparseAutoencoding
from sublimate.training.trainer import Trainer, TrainerConfig

_RESAMPLES = 1000
_LEAST = 20


@dataclass(frozen=True)
class Atom:
    """One direction of the autoencoder, and what became of it.

    Attributes:
        shows: what most of the images show in which it is strongest, "digit seven".
        share: of these images.
        before, after: its energy, the mean square of its code, in the base's and in the edited model's images.
        ratio: after / (after + before): 0 is suppressed, 0.5 as it was, 1 exaggerated.
        low, high: the ratio's interval over resampled pairs of images; those of all atoms hold at once in 95 % of
            cases, so that of many which stayed none should seem to have moved.
    """

    shows: str
    share: float
    before: float
    after: float
    ratio: float
    low: float
    high: float

    @property
    def moved(self) -> bool:
        """Whether its interval leaves out 0.5."""
        return not self.low <= 0.5 <= self.high


class RowsSource:
    """Rows of a matrix as states of one token, drawn with equal chances.

    Args:
        rows: (n, width) float32.
    """

    provides: frozenset[str] = frozenset({"activations"})
    model = None

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def drawn(self, random: SampleRandom) -> Tensor:
        """Row numbers, one per sample."""
        return random.integers(len(self.rows))

    def states(self, drawn: Tensor) -> Tensor:
        """(samples, 1, width)."""
        return self.rows[drawn][:, None]

    def batch(self, random: SampleRandom) -> Batch:
        return Batch(Condition(), random, {"activations": self.states(self.drawn(random))})


def blindspots(
    before: Tensor,
    after: Tensor,
    read_before: Readings,
    read_after: Readings,
    *,
    config: SparseAutoencoderConfig | None = None,
    steps: int = 500,
    batch_size: int = 128,
    seed: int = 0,
) -> list[Atom]:
    """Atoms by how far their energy surely moved (Bohacek et al. 2025, arXiv 2506.19708), the farthest first.

    The published map compares generated images with real ones, by an archetypal autoencoder of 32,000 atoms on DINOv2.
    Here the edited model's images stand against the base's for the same prompts and noise. A small top-k autoencoder
    learns on one half of the pairs and the energies are those of the other, of which it has no knowledge. Atoms in
    fewer than one image of a hundred, or than twenty, are left out.

    Intervals are the ratio +- c standard errors of its resamples, where c is the 95 % quantile of the largest of all
    atoms' standardised deviations (Romano & Wolf 2005).

    Args:
        before: features (N, width) of the base's images, such as a detector's.
        after: the same of the edited model's, in the same order.
        read_before: what a detector saw in the base's images.
        read_after: what it saw in the edited model's.
        config: of the autoencoder; 4 atoms per dimension, of which an image uses 8, unless given.
        steps: of its training.
        batch_size: images per step.
        seed: of training and resampling.

    Raises:
        ValueError: when the features cannot be paired with each other and the readings.
    """
    if before.shape != after.shape or len(before) != len(read_before) or len(after) != len(read_after):
        raise ValueError(
            f"Features of {tuple(before.shape)} and {tuple(after.shape)} with {len(read_before)} and "
            f"{len(read_after)} readings cannot be paired: give the same prompts and seeds of both models."
        )
    config = config or SparseAutoencoderConfig(expansion=4, k=min(8, before.shape[1]), aux_k=32, learning_rate=1e-3)
    generator = torch.Generator().manual_seed(key(seed, "halves"))
    learnt, judged = torch.randperm(len(before), generator=generator).chunk(2)
    rows = torch.cat([before[learnt], after[learnt]]).float()
    mean, scale = rows.mean(0), rows.std()
    autoencoder = _trained((rows - mean) / scale, config, steps, batch_size, seed)
    codes = autoencoder.encode((torch.cat([before[judged], after[judged]]).float() - mean) / scale).detach()
    pairs = torch.stack(codes.split(len(judged))).square()  # (2, pairs, atoms)
    used = (codes > 0).sum(0) >= max(_LEAST, 0.01 * len(codes))
    labels = [labels[i] for labels in map(_labels, (read_before, read_after)) for i in judged.tolist()]
    chosen = torch.randint(len(judged), (_RESAMPLES, len(judged)), generator=generator)
    # How often each pair is in each resample: (resamples, pairs).
    counts = torch.zeros(_RESAMPLES, len(judged)).scatter_add_(1, chosen, torch.ones(chosen.shape))
    resampled = torch.einsum("rn,mna->mra", counts, pairs.cpu()) / len(judged)
    energies = pairs.mean(1).cpu()[:, used.cpu()]  # (2, atoms in use)
    ratios = _ratio(*energies)
    lows, highs = _simultaneous(ratios, _ratio(*resampled)[:, used.cpu()])
    found = []
    for place, atom in enumerate(used.nonzero().flatten().tolist()):
        shows, share = _name(codes[:, atom], labels)
        numbers = (column[place] for column in (*energies.tolist(), ratios.tolist(), lows.tolist(), highs.tolist()))
        found.append(Atom(shows, share, *numbers))
    return sorted(found, key=lambda a: (-max(a.low - 0.5, 0.5 - a.high), -abs(a.ratio - 0.5)))


def _simultaneous(ratios: Tensor, resampled: Tensor) -> tuple[Tensor, Tensor]:
    """Intervals of ratios (atoms,) from resamples (resamples, atoms) that hold for all of them at once."""
    if not len(ratios):
        return ratios, ratios
    errors = resampled.std(0)
    # What no resample moves, but for rounding, stays where it is.
    standardised = torch.where(errors > 1e-5, (resampled - ratios).abs() / errors, 0.0)
    width = errors * standardised.amax(1).quantile(0.95)
    return (ratios - width).clamp_min(0), (ratios + width).clamp_max(1)


def _ratio(before: Tensor, after: Tensor) -> Tensor:
    return after / (before + after).clamp_min(1e-12)


def _trained(rows: Tensor, config: SparseAutoencoderConfig, steps: int, size: int, seed: int) -> SparseAutoencoder:
    source = RowsSource(rows)
    objective = SparseAutoencoding(source, config, seed=seed)
    with tempfile.TemporaryDirectory(prefix="sublimate-") as folder, torch.random.fork_rng(devices=[]):
        options = TrainerConfig(
            output_dir=Path(folder), seed=seed, max_train_steps=steps, train_batch_size=size, checkpointing_steps=None
        )
        Trainer(objective, source, options, progress=False).run()
    return objective.autoencoder.cpu().eval()


def _labels(readings: Readings) -> list[list[str]]:
    """What each image shows, one label per group, with the group's name."""
    columns = []
    for group, choices in readings.choices.items():
        names = (*(f"{group} {label}" for label in readings.groups[group]), f"no {group}")
        columns.append([names[choice] for choice in choices.tolist()])
    return [list(shown) for shown in zip(*columns, strict=True)]


def _name(code: Tensor, labels: Sequence[Sequence[str]]) -> tuple[str, float]:
    """The label that stands out among the images in which an atom is strongest, and its share of them."""
    active = int((code > 0).sum())
    strongest = code.topk(min(active, max(8, int(0.02 * len(code))))).indices.tolist()
    everywhere = _shares(labels)
    here = _shares([labels[i] for i in strongest])
    name = max(here, key=lambda label: here[label] - everywhere[label])
    return name, here[name]


def _shares(labels: Sequence[Sequence[str]]) -> dict[str, float]:
    counts: dict[str, float] = {}
    for shown in labels:
        for label in shown:
            counts[label] = counts.get(label, 0) + 1 / len(labels)
    return counts
