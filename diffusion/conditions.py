"""Conditions: what a network is told besides x_t and t, as one mapping of batch-first tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TEACHER = "teacher."
"""Before the name of an entry: what a teacher reads in that entry's place, and no one else."""


class Condition(dict[str, Tensor]):
    """What a network is told, by name; every tensor is batch first. Without keys: unconditional.

    "text" and every "text.<part>" ("text.pooled", "text.mask"; class labels sit in "text") are what the null condition
    replaces. Reserved besides: "negative" and "negative.mask" (a negative prompt), "target_time" (the time a
    consistency trajectory jumps to), "guidance" (the scale, where it is an input), "extra" and "extra.<part>" (masks,
    small images, sizes), and "teacher.<entry>" (what a teacher reads in the place of another entry).

    Raises:
        TypeError: for a value that is not a tensor.
        ValueError: for tensors without a batch dimension or of different batch sizes.
    """

    def __init__(self, values: Mapping[str, Tensor] | None = None, /, **more: Tensor) -> None:
        super().__init__(dict(values or {}), **more)
        for key, value in self.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"A condition holds tensors, but {key!r} is a {type(value).__name__}.")
            if value.ndim == 0:
                raise ValueError(f"A condition's tensors are batch first, but {key!r} has no dimensions.")
        sizes = {key: len(value) for key, value in self.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"A condition's tensors need one batch size, but have {sizes}.")

    @property
    def batch_size(self) -> int | None:
        """The number of samples, None without keys."""
        return next((len(value) for value in self.values()), None)

    @property
    def text_keys(self) -> tuple[str, ...]:
        """The keys that the null condition replaces."""
        return tuple(key for key in self if key == "text" or key.startswith("text."))

    @property
    def extra(self) -> Condition:
        """The entries "extra" and "extra.<part>"."""
        return Condition({key: value for key, value in self.items() if key == "extra" or key.startswith("extra.")})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Moved to a device; floating-point tensors also converted to a dtype."""
        return Condition(
            {key: v.to(device=device, dtype=dtype if v.is_floating_point() else None) for key, v in self.items()}
        )

    def index(self, rows: int | slice | Sequence[int] | Tensor) -> Condition:
        """The samples chosen by a slice, indices or a mask; a single index keeps a batch of 1."""
        chosen: Any = rows
        if isinstance(rows, int):
            chosen = [rows]
        return Condition({key: value[chosen] for key, value in self.items()})

    def expand(self, n: int) -> Condition:
        """A batch of 1 repeated n times, without copying.

        Raises:
            ValueError: for a batch that is neither 1 nor n.
        """
        if self.batch_size in (None, n):
            return self
        if self.batch_size != 1:
            raise ValueError(f"A condition of batch size {self.batch_size} cannot serve {n} samples.")
        return Condition({key: value.expand(n, *value.shape[1:]) for key, value in self.items()})

    def replace(self, **values: Tensor) -> Condition:
        """A copy with some entries exchanged or added; pass keys with a dot as **{"text.pooled": value}."""
        return Condition({**self, **values})

    def with_teacher(self, told: Condition) -> Condition:
        """A copy that tells a teacher the text of `told` in the place of its own."""
        return Condition({**self, **{f"{TEACHER}{key}": told[key] for key in told.text_keys}})

    def for_teacher(self) -> Condition:
        """What a teacher reads."""
        own = {key.removeprefix(TEACHER): value for key, value in self.items() if key.startswith(TEACHER)}
        return Condition({**self.for_student(), **own})

    def for_student(self) -> Condition:
        """What everyone but a teacher reads."""
        return Condition({key: value for key, value in self.items() if not key.startswith(TEACHER)})

    def with_null(self, null: Condition) -> Condition:
        """A copy whose text is the null condition's, a teacher's too.

        Args:
            null: of batch size 1 or this one's; its other keys are not used.

        Raises:
            ValueError: if there is no text to replace, or the two do not have the same text keys.
        """
        if set(self.text_keys) != set(null.text_keys) or not self.text_keys:
            raise ValueError(
                f"The null condition's text keys {sorted(null.text_keys)} cannot replace {sorted(self.text_keys)}: "
                "both need the same ones, and at least one."
            )
        text = Condition({key: null[key].to(self[key].device) for key in self.text_keys})
        text = text.expand(self.batch_size or 1)
        taught = {name: value for key, value in text.items() if (name := f"{TEACHER}{key}") in self}
        return Condition({**self, **text, **taught})

    def dropping(self, rows: Tensor, null: Condition) -> Condition:
        """A copy in which some samples' text is the null condition's.

        Args:
            rows: (batch,) bool, where.
            null: as in `with_null`.
        """
        without = self.with_null(null)
        where = {key: rows.view(-1, *[1] * (value.ndim - 1)) for key, value in self.items()}
        return Condition({key: torch.where(where[key], without[key], value) for key, value in self.items()})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Several batches as one.

        Raises:
            ValueError: if the keys or the shapes of the samples differ.
        """
        keys = [set(condition) for condition in conditions]
        if any(other != keys[0] for other in keys):
            raise ValueError(f"Conditions with different keys cannot be joined: {[sorted(k) for k in keys]}.")
        joined = {}
        for key in conditions[0] if conditions else ():
            parts = [condition[key] for condition in conditions]
            if len({part.shape[1:] for part in parts}) > 1:
                raise ValueError(f"{key!r} has samples of different shapes: {[tuple(part.shape) for part in parts]}.")
            joined[key] = torch.cat(parts)
        return Condition(joined)
