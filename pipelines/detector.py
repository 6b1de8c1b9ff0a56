"""The protocol of a detector: what concepts an image shows, or that it shows none of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Detector(Protocol):
    """Reads images into probabilities over groups of mutually exclusive labels.

    Every group ends in a reject class, "none of them": a digit classifier without one calls noise "three", and an
    eraser that produces gibberish would count as successful. Implementations are differentiable with respect to the
    images, preprocessing included, so that attacks and erasers can follow the gradient.
    """

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """The labels of each group in the order of the columns, without the reject class."""
        ...

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]:
        """Probabilities per group.

        Args:
            images: (B, 3, H, W) in [0, 1], on the detector's device.

        Returns:
            group -> (B, labels + 1), each row summing to 1; the last column is "none of them".
        """
        ...
