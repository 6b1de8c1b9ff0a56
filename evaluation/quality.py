"""How well a model draws: prompt agreement by a detector, and fidelity to real images beside its floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from sublimate.evaluation.agreement import Agreement, agreement
from sublimate.evaluation.drawing import Generate
from sublimate.evaluation.fidelity import Extractor, Fidelity, extract, fidelity, real_versus_real
from sublimate.evaluation.studies import PromptSet
from sublimate.pipelines.detector import Detector

Real = Callable[[int], Tensor]
"""n -> n real images (n, 3, H, W) in [0, 1] that the model never saw."""


@dataclass(frozen=True)
class Quality:
    """What was measured of one model with one seed.

    Attributes:
        agreement: how often images show what their prompts ask for.
        fidelity: distances to real images.
        floor: the same distances between two draws of real images, at the same n.
    """

    agreement: Agreement
    fidelity: Fidelity
    floor: Fidelity

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return {
            "agreement": self.agreement.to_dict(),
            "fidelity": asdict(self.fidelity),
            "floor": asdict(self.floor),
        }


def measure_quality(
    generate: Generate,
    prompts: PromptSet,
    real: Real,
    detector: Detector,
    extractor: Extractor,
    *,
    judged: int,
    seed: int = 0,
) -> Quality:
    """Draws every prompt once and measures.

    Args:
        generate: the model.
        prompts: what to draw, n of them; distances are measured on all.
        real: gives as many real images, and twice as many for the floor.
        detector: what judges.
        extractor: features for the distances.
        judged: the first so many prompts count for the agreement.
        seed: of the images.

    Returns:
        The measurements.

    Raises:
        ValueError: for more judged prompts than there are, or too few images for the distances.
    """
    n = len(prompts.texts)
    if not 0 < judged <= n:
        raise ValueError(f"{judged} prompts cannot be judged of {n}; ask for 1 to {n}")
    images = generate(prompts.texts, seed)
    references = extract(extractor, real(2 * n))
    return Quality(
        agreement=agreement(detector, images[:judged], prompts.expected[:judged]),
        fidelity=fidelity(extract(extractor, images), references[:n]),
        floor=real_versus_real(references, n, seed=seed),
    )
