"""What an erasure study found: rates of two models side by side, what moved, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from sublimate.evaluation.criteria import Criterion, verdict_sentence
from sublimate.evaluation.intervals import Difference, Rate, paired_difference, plain
from sublimate.evaluation.studies import ErasureStudy


@dataclass(frozen=True)
class Comparison:
    """One rate in both models, and its change on the same prompts and seeds."""

    before: Rate
    after: Rate
    change: Difference

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> Comparison:
        """From outcomes (N,) bool; entry i of both has the same prompt and seed."""
        one, other = before.tolist(), after.tolist()
        return cls(Rate.of(one), Rate.of(other), paired_difference(one, other))

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Counts, values and limits as plain numbers."""
        return {"before": plain(self.before), "after": plain(self.after), "change": plain(self.change)}


@dataclass(frozen=True)
class Drift:
    """How far images moved that should not have moved.

    Attributes:
        pixels: root-mean-square pixel difference between the two models, pixels in [0, 1]; mean over images.
        pixels_apart: the same between neighbouring images of the *base* model, which have another prompt or seed:
            what no relation at all would give. None for a single prompt.
        cosine: mean cosine similarity of the images' features; None without a feature extractor.
        n: pairs.
    """

    pixels: float
    pixels_apart: float | None
    cosine: float | None
    n: int


@dataclass(frozen=True)
class Example:
    """One prompt drawn by both models from the same noise; images (3, H, W) in [0, 1]."""

    role: str
    prompt: str
    seed: int
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class ErasureResult:
    """What a study found.

    Attributes:
        study: what was asked.
        rates: how often the concept is seen: "target", "synonyms"; how often what was asked for is seen: "siblings",
            "untouched" (the rest of the target prompts), "unrelated"; how often a target or synonym image is none of
            the labels: "rejected", and how often a sibling's or an unrelated one: "rejected elsewhere". Only what the
            study asks.
        siblings: accuracy of each sibling label.
        drawn_instead: what the edited model's target images show, most frequent first.
        drift: over the unrelated prompts; None without them.
        criteria: each rate against its bar.
        examples: image pairs to look at.
    """

    study: ErasureStudy
    rates: Mapping[str, Comparison]
    siblings: Mapping[str, Comparison]
    drawn_instead: Mapping[str, int]
    drift: Drift | None
    criteria: tuple[Criterion, ...]
    examples: tuple[Example, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every measured value meets its bar."""
        return all(criterion.met for criterion in self.criteria)

    @property
    def verdict(self) -> str:
        """One sentence for people, of an erasure that nobody attacked."""
        return self.verdict_with("no attack was tried")

    def verdict_with(self, attacks: str) -> str:
        """The verdict in one sentence, with what came of attacks: bars alone say nothing about who looks further."""
        unjudged = "unrelated" in self.study.roles and "unrelated" not in self.rates
        limits = ["unrelated prompts were drawn but not judged, since none says what it shows"] if unjudged else []
        return verdict_sentence(self.criteria, (*limits, attacks))

    def to_dict(self) -> dict[str, Any]:
        """The result as plain numbers and strings, without the images."""
        return {
            "concept": self.study.concept,
            "group": self.study.group,
            "label": self.study.detected_as,
            "seeds": list(self.study.seeds),
            "prompts": {role: list(self.study.prompts[role].texts) for role in self.study.roles},
            "verdict": self.verdict,
            "passed": self.passed,
            "criteria": [criterion.to_dict() for criterion in self.criteria],
            "rates": {name: comparison.to_dict() for name, comparison in self.rates.items()},
            "siblings": {name: comparison.to_dict() for name, comparison in self.siblings.items()},
            "drawn_instead": dict(self.drawn_instead),
            "drift": asdict(self.drift) if self.drift else None,
        }
