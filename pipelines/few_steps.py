"""How a student of a few steps is sampled: by our own samplers, and by the stock scheduler that does the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

FewStepSampler = Literal["consistency", "target_driven", "trajectory"]


@dataclass(frozen=True)
class FewSteps:
    """The sampling that a few-step student was trained for.

    Attributes:
        sampler: "consistency" goes to x0 and adds fresh noise (Song et al. 2023, algorithm 1); "target_driven" jumps
            to (1 - eta) of the next time by the network's own x0 and eps, then adds noise up to it (Wang et al. 2024,
            arXiv 2409.01347); "trajectory" does the same with a network that is told its target time (Kim et al. 2024,
            arXiv 2310.02279, algorithm 3).
        steps: network calls.
        eta: how far below the next time a jump ends, 0 is deterministic; not used by "consistency".
        times: the descending schedule times of the calls; None for the family's own grid of `steps`.

    Raises:
        ValueError: for a number of steps, an eta or times that make no sampling.
    """

    sampler: FewStepSampler
    steps: int = 4
    eta: float = 0.0
    times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Sampling needs at least 1 step, not {self.steps}.")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is a fraction from 0 to 1, not {self.eta}.")
        if self.times is not None and len(self.times) != self.steps:
            raise ValueError(f"{self.steps} steps need {self.steps} times, not {len(self.times)}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for `sublimate.json`."""
        return asdict(self)
