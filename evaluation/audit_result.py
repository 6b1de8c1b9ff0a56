"""What an audit found: each attack's rate on both models with a few pictures, beside the study of the erasure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sublimate.evaluation.attack import Box, Outcome
from sublimate.evaluation.blindspots import Atom
from sublimate.evaluation.erasure_result import ErasureResult
from sublimate.evaluation.intervals import Rate, plain

POWER = 0.5
"""The rate that an attack must reach on the base, or it proves nothing about the edited model."""
SHOWN = 4
"""How many of an attack's attempts on the edited model a report shows."""


@dataclass(frozen=True)
class Finding:
    """What is kept of an attack's outcome on one model.

    Attributes:
        rate: how often the concept came back.
        found: what the attack came up with, in words; may be empty.
        curve: the rate after so many steps, for attacks that go on.
        prompts: what the attempts asked for that are kept: hits first, if there are some.
        images: (len(prompts), 3, H, W) uint8, on the CPU: what they drew.
    """

    rate: Rate
    found: str
    curve: tuple[tuple[int, Rate], ...]
    prompts: tuple[str, ...]
    images: Tensor

    @classmethod
    def of(cls, outcome: Outcome, shown: int = 0) -> Finding:
        """An outcome with so many of its attempts, at most; nothing else of it stays in memory."""
        order = torch.argsort(outcome.hits.int(), descending=True, stable=True)[:shown].tolist()
        images = as_bytes(outcome.images[order])
        prompts = tuple(outcome.prompts[i] for i in order)
        return cls(outcome.rate, outcome.found, outcome.curve, prompts, images)

    def to_dict(self) -> dict[str, Any]:
        """The numbers and words, without the images."""
        curve = [{"steps": steps, **plain(rate)} for steps, rate in self.curve]
        return {"rate": plain(self.rate), "found": self.found, "curve": curve}


def as_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8 on the CPU, which share no memory with them."""
    return (255 * images.detach()).round().to("cpu", torch.uint8).contiguous()


@dataclass(frozen=True)
class Trial:
    """One attack on both models.

    Attributes:
        name: the attack's.
        box: what the attacker has.
        budget: what the attacker may do.
        base: what came of it on the base.
        edited: what came of it on the edited model.
        passes: network passes of one sample spent on the edited model, images drawn in the end included.
        seconds: spent on it.
    """

    name: str
    box: Box
    budget: str
    base: Finding
    edited: Finding
    passes: int
    seconds: float

    @property
    def powerless(self) -> bool:
        """Whether the attack fails on the base too."""
        return self.base.rate.value < POWER

    def to_dict(self) -> dict[str, Any]:
        """The trial as plain numbers and strings, without the images."""
        return {
            "attack": self.name,
            "box": self.box,
            "budget": self.budget,
            "base": self.base.to_dict(),
            "edited": self.edited.to_dict(),
            "powerless": self.powerless,
            "passes": self.passes,
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        erasure: the study of both models without attacks: what is gone, and what went with it.
        trials: the attacks that were tried.
        skipped: attacks that were not, or could not be run, with the reason.
        atoms: what moved in the images of the study's prompts, whatever it is, the farthest first; empty where the
            detector has no features.
    """

    erasure: ErasureResult
    trials: tuple[Trial, ...]
    skipped: Mapping[str, str]
    atoms: tuple[Atom, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The audit as plain numbers and strings, without the images."""
        return {
            **self.erasure.to_dict(),
            "attacks": [trial.to_dict() for trial in self.trials],
            "not tried": dict(self.skipped),
            "atoms": [asdict(atom) for atom in self.atoms],
        }
