"""Random numbers keyed by what they are for: accumulation, processes and restarts change none of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from sublimate.pipelines.placement import sent


def key(*parts: object) -> int:
    """A 63-bit seed that depends on every part, the same on every machine and in every Python process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class SampleRandom:
    """One stream of random numbers per sample of a batch.

    Sample `i` of the global batch draws from a generator seeded by (seed, step, turn, i) alone. Slicing shares the
    streams: a micro-batch continues where the whole batch stopped, so 4 micro-batches of 1 and 1 of 4 see the same
    numbers. Generators live on the CPU, which makes the numbers independent of the device too.

    Args:
        seed: the run's seed.
        step: the training step.
        turn: name of the turn inside the step.
        indices: global indices of this process's samples.
    """

    def __init__(self, seed: int, step: int, turn: str, indices: Sequence[int]) -> None:
        self.indices = tuple(indices)
        self._generators = [torch.Generator().manual_seed(key(seed, step, turn, index)) for index in indices]

    def __len__(self) -> int:
        return len(self._generators)

    def __getitem__(self, part: slice) -> SampleRandom:
        sliced = object.__new__(SampleRandom)
        sliced.indices = self.indices[part]
        sliced._generators = self._generators[part]
        return sliced

    def twin(self) -> SampleRandom:
        """The same streams from where they stand: what it draws, these draw again."""
        twin = object.__new__(SampleRandom)
        twin.indices = self.indices
        twin._generators = [generator.clone_state() for generator in self._generators]
        return twin

    def normal(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Standard normal numbers, float32, shape (batch, *shape)."""
        return sent(torch.stack([torch.randn(tuple(shape), generator=g) for g in self._generators]), device)

    def uniform(self, device: torch.device | str = "cpu") -> Tensor:
        """Uniform numbers in [0, 1), float64, shape (batch,)."""
        return sent(torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators]), device)

    def integers(self, high: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform integers in [0, high), int64, shape (batch,)."""
        return sent(torch.cat([torch.randint(high, (1,), generator=g) for g in self._generators]), device)
