"""A world small enough to compute by hand: flat pictures whose first two channels say what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor


class Palette:
    """Exact painter and exact detector of flat 2x2 pictures; `None` as a label paints something that is neither."""

    groups: Mapping[str, tuple[str, ...]] = {"digit": ("zero", "one", "two", "seven"), "ink": ("red", "green", "blue")}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        found = {}
        for channel, (group, labels) in enumerate(self.groups.items()):
            levels = torch.linspace(0, 1, len(labels) + 1)
            found[group] = torch.softmax(-100 * (images[:, channel].mean(dim=(1, 2))[:, None] - levels).abs(), dim=1)
        return found

    def paint(self, contents: Sequence[Mapping[str, str | None]], seed: int = 0) -> Tensor:
        """One picture per mapping; the third channel is noise keyed by the seed."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.zeros(len(contents), 3, 2, 2)
        images[:, 2] = torch.rand(len(contents), 2, 2, generator=generator)
        for image, content in zip(images, contents, strict=True):
            for channel, (group, labels) in enumerate(self.groups.items()):
                label = content.get(group)
                image[channel] = (len(labels) if label is None else labels.index(label)) / len(labels)
        return images


@pytest.fixture
def palette() -> Palette:
    return Palette()
