"""Whether images show what their prompts ask for, by a detector that may also answer "none of them"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sublimate.evaluation.intervals import Rate, plain
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.model import Model
from sublimate.pipelines.placement import brought_to

_MANY = 40  # labels that still fit into a sentence
Expected = Mapping[str, str | None]
"""What one prompt asks for: group -> label. A group that is absent or None was not mentioned."""


@dataclass(frozen=True)
class Readings:
    """What a detector sees in N images.

    Attributes:
        groups: the detector's labels per group.
        choices: per group (N,) the most probable column; the column after the last label means "none of them".
    """

    groups: Mapping[str, tuple[str, ...]]
    choices: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.choices.values())))

    @staticmethod
    def cat(parts: Sequence[Readings]) -> Readings:
        """The readings of several sets of images by one detector, one after the other."""
        groups = parts[0].groups
        return Readings(groups, {group: torch.cat([part.choices[group] for part in parts]) for group in groups})

    def shows(self, group: str, label: str) -> Tensor:
        """(N,) bool: which images show `label`.

        Raises:
            ValueError: for a group or label that the detector does not know.
        """
        return self.choices[group] == check_label(self.groups, group, label)

    def rejected(self) -> Tensor:
        """(N,) bool: which images are none of the labels in at least one group, that is, broken or off the map."""
        return torch.stack([choice == len(self.groups[group]) for group, choice in self.choices.items()]).any(dim=0)

    def counts(self, group: str, where: Tensor | None = None) -> dict[str, int]:
        """How many images show each label of a group, most frequent first, None of them as "none of them".

        Args:
            group: one of the detector's groups.
            where: (N,) bool, the images to count; all of them unless given.
        """
        choice = self.choices[group] if where is None else self.choices[group][where]
        names = (*self.groups[group], "none of them")
        found = {name: int((choice == column).sum()) for column, name in enumerate(names)}
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def check_label(groups: Mapping[str, tuple[str, ...]], group: str, label: str) -> int:
    """The column of a label.

    Raises:
        ValueError: for a group or label the detector does not know, naming those it knows.
    """
    if group not in groups:
        raise ValueError(f"the detector knows no group {group!r}; it knows {', '.join(groups)}")
    if label not in groups[group]:
        raise ValueError(f"the detector knows no {group} {label!r}; it knows {_listed(groups[group], label)}")
    return groups[group].index(label)


def _listed(labels: tuple[str, ...], wanted: str) -> str:
    """All labels, or of very many those that look like the one that was wanted."""
    if len(labels) <= _MANY:
        return ", ".join(labels)
    containing = [label for label in labels if wanted.lower() in label.lower()]
    alike = (containing or difflib.get_close_matches(wanted, labels, cutoff=0.4))[:5]
    return f"{len(labels)} labels" + (f", among them {'; '.join(alike)}" if alike else "")


def check_judge(model: Model, detector: Detector, expected: Iterable[Expected] = ()) -> None:
    """Makes sure, before anything is drawn, that a detector can judge what will be.

    Args:
        model: what will draw.
        detector: what will judge.
        expected: what the prompts ask for.

    Raises:
        ValueError: for pictures that the detector does not read, or a group or label that it does not know.
    """
    for group, label in {(g, label) for asked in expected for g, label in asked.items() if label is not None}:
        check_label(detector.groups, group, label)
    with torch.no_grad():
        read(detector, model.render(torch.zeros(1, *model.latent_shape, device=model.device, dtype=model.dtype)))


@torch.no_grad()
def read(detector: Detector, images: Tensor, *, batch_size: int = 256) -> Readings:
    """What the detector sees in each image.

    Args:
        detector: see `sublimate.pipelines.detector.Detector`.
        images: (N, 3, H, W) in [0, 1], at least one, on any device.
        batch_size: images per call of the detector.

    Returns:
        The most probable label of each group.

    Raises:
        ValueError: without images, or for one that is not finite.
    """
    if not len(images):
        raise ValueError("there is no image to read; generate at least one")
    broken = sum(int((~batch.isfinite()).flatten(1).any(dim=1).sum()) for batch in images.split(batch_size))
    if broken:
        raise ValueError(f"{broken} of {len(images)} images are not finite, so there is nothing to read in them")
    batches = [detector(brought_to(detector, batch)) for batch in images.split(batch_size)]
    choices = {group: torch.cat([batch[group].argmax(dim=1) for batch in batches]).cpu() for group in detector.groups}
    return Readings({group: tuple(labels) for group, labels in detector.groups.items()}, choices)


@dataclass(frozen=True)
class Agreement:
    """How well images obey their prompts.

    Attributes:
        groups: per group the rate of images that show the label their prompt asks for, over prompts that mention it.
        together: the rate of images that show everything their prompt mentions, over prompts that mention anything.
        rejected: the rate of images that are none of the labels in at least one group, over all images.
    """

    groups: Mapping[str, Rate]
    together: Rate
    rejected: Rate

    def to_dict(self) -> dict[str, Any]:
        """The rates as JSON values."""
        rates = {**self.groups, "together": self.together, "rejected": self.rejected}
        return {name: plain(rate) for name, rate in rates.items()}


def obeyed(readings: Readings, expected: Sequence[Expected], groups: Iterable[str]) -> tuple[Tensor, Tensor]:
    """Which prompts mention any of some groups, and which images show everything that is mentioned of them.

    Args:
        readings: of N images.
        expected: what each of the N prompts asks for.
        groups: the groups to look at.

    Returns:
        mentioned (N,) and correct (N,), bool; correct is True where nothing is mentioned.

    Raises:
        ValueError: for another number of prompts than images, or a group or label the detector does not know.
    """
    if len(expected) != len(readings):
        raise ValueError(f"{len(expected)} expectations for {len(readings)} images; give one per image")
    mentioned = torch.zeros(len(readings), dtype=torch.bool)
    correct = torch.ones(len(readings), dtype=torch.bool)
    for group in groups:
        labels = [wanted.get(group) for wanted in expected]
        column = torch.tensor(
            [-1 if label is None else check_label(readings.groups, group, label) for label in labels]
        )
        mentioned |= column >= 0
        correct &= (column < 0) | (readings.choices[group] == column)
    return mentioned, correct


def agreement(detector: Detector, images: Tensor, expected: Sequence[Expected], *, batch_size: int = 256) -> Agreement:
    """Prompt accuracy: how often the detector sees what each image's prompt asked for.

    Args:
        detector: what judges.
        images: (N, 3, H, W) in [0, 1].
        expected: per image the label asked for in each group; groups not mentioned are not counted.
        batch_size: images per call of the detector.

    Returns:
        Rates with intervals; a group that no prompt mentions has none.

    Raises:
        ValueError: if the numbers differ, nothing is mentioned at all, or the detector does not know a group or label.
    """
    return agreement_of(read(detector, images, batch_size=batch_size), expected)


def agreement_of(readings: Readings, expected: Sequence[Expected]) -> Agreement:
    """`agreement` for images that were read already."""
    for group in {group for wanted in expected for group in wanted} - set(readings.groups):
        raise ValueError(f"the detector knows no group {group!r}; it knows {', '.join(readings.groups)}")
    rates: dict[str, Rate] = {}
    for group in readings.groups:
        mentioned, correct = obeyed(readings, expected, (group,))
        if mentioned.any():
            rates[group] = Rate.of(correct[mentioned].tolist())
    mentioned, correct = obeyed(readings, expected, readings.groups)
    if not mentioned.any():
        raise ValueError("no prompt mentions anything the detector knows; say what each prompt asks for")
    return Agreement(
        groups=rates,
        together=Rate.of(correct[mentioned].tolist()),
        rejected=Rate.of(readings.rejected().tolist()),
    )
