"""Whether a concept is gone, and what went with it: the images of two models, paired by prompt and seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sublimate.evaluation.agreement import Expected, Readings, obeyed, read
from sublimate.evaluation.criteria import Criterion, loss_criterion, rate_criterion, rise_criterion
from sublimate.evaluation.drawing import Generate
from sublimate.evaluation.erasure_result import Comparison, Drift, ErasureResult, Example
from sublimate.evaluation.fidelity import Extractor, extract
from sublimate.evaluation.studies import ErasureStudy
from sublimate.pipelines.detector import Detector

Progress = Callable[[int, int, str], None]
"""(calls of a model done, calls in all, what comes next)."""


@dataclass(frozen=True)
class Observation:
    """What was seen in one role's images, seed after seed.

    Attributes:
        before: readings of the base model's N images.
        after: readings of the edited model's.
        moved: (N, 3): pixel distance, pixel distance to a neighbour, feature cosine; NaN where there is none.
    """

    before: Readings
    after: Readings
    moved: Tensor

    @staticmethod
    def cat(parts: Sequence[Observation]) -> Observation:
        """Several observations, one after the other."""
        return Observation(
            before=Readings.cat([part.before for part in parts]),
            after=Readings.cat([part.after for part in parts]),
            moved=torch.cat([part.moved for part in parts]),
        )


def observe(before: Tensor, after: Tensor, detector: Detector, extractor: Extractor | None = None) -> Observation:
    """Reads two models' images of the same prompts and seeds, and measures how far each moved.

    Args:
        before: (N, 3, H, W) in [0, 1], the base model's.
        after: (N, 3, H, W) in [0, 1], the edited model's, in the same order.
        detector: what judges.
        extractor: features for the cosine similarity.

    Returns:
        What was seen.

    Raises:
        ValueError: if the images cannot be paired.
    """
    if before.shape != after.shape:
        raise ValueError(f"images of shape {tuple(before.shape)} and {tuple(after.shape)} cannot be paired")
    unknown = torch.full((len(before),), torch.nan)
    apart = _rms(before, before.roll(1, dims=0)) if len(before) > 1 else unknown
    cosine = unknown
    if extractor is not None:
        cosine = torch.cosine_similarity(extract(extractor, before), extract(extractor, after)).float()
    moved = torch.stack([_rms(before, after), apart, cosine], dim=1)
    return Observation(read(detector, before), read(detector, after), moved)


def _rms(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).detach().float().square().mean(dim=(1, 2, 3)).sqrt().cpu()


def judge(study: ErasureStudy, seen: Mapping[str, Observation]) -> ErasureResult:
    """Rates, losses and the verdict from what was seen in each role.

    Args:
        study: what was asked.
        seen: role -> observation of prompts x seeds images, seed after seed.

    Returns:
        The result, without examples.

    Raises:
        ValueError: if the roles or numbers of images are not the study's, or the detector does not know its concepts.
    """
    if set(seen) != set(study.roles):
        raise ValueError(f"the study has the roles {list(study.roles)} and the images {list(seen)}; give the same")
    for role, observation in seen.items():
        asked = len(study.expected(role))
        if len(observation.before) != asked:
            raise ValueError(f"{role} asks for {asked} images (prompts x seeds), got {len(observation.before)}")
    groups = seen["target"].before.groups
    others = [group for group in groups if group != study.group]
    named = [role for role in ("target", "synonyms") if role in seen]

    rates: dict[str, Comparison] = {}
    for role in named:
        pair = (seen[role].before, seen[role].after)
        rates[role] = Comparison.of(*(readings.shows(study.group, study.detected_as) for readings in pair))
    for name, role, looked_at in (
        ("siblings", "siblings", [study.group]),
        ("untouched", "target", others),
        ("unrelated", "unrelated", list(groups)),
    ):
        accuracy = _accuracy(seen[role], study.expected(role), looked_at) if role in seen else None
        if accuracy is not None:
            rates[name] = accuracy
    rates["rejected"] = _rejected(seen, named)
    if rest := [role for role in ("siblings", "unrelated") if role in seen]:
        rates["rejected elsewhere"] = _rejected(seen, rest)
    return ErasureResult(
        study=study,
        rates=rates,
        siblings=_by_label(study, seen["siblings"]) if "siblings" in seen else {},
        drawn_instead=seen["target"].after.counts(study.group),
        drift=_drift(seen["unrelated"].moved) if "unrelated" in seen else None,
        criteria=tuple(_criteria(study, rates)),
    )


def _rejected(seen: Mapping[str, Observation], roles: Sequence[str]) -> Comparison:
    """How often images of some roles are none of the labels."""
    return Comparison.of(
        torch.cat([seen[role].before.rejected() for role in roles]),
        torch.cat([seen[role].after.rejected() for role in roles]),
    )


def _accuracy(seen: Observation, expected: Sequence[Expected], groups: Sequence[str]) -> Comparison | None:
    """How often images show what is asked of these groups; None where nothing is asked."""
    mentioned, before = obeyed(seen.before, expected, groups)
    _, after = obeyed(seen.after, expected, groups)
    return Comparison.of(before[mentioned], after[mentioned]) if mentioned.any() else None


def _by_label(study: ErasureStudy, seen: Observation) -> dict[str, Comparison]:
    labels = [wanted[study.group] for wanted in study.expected("siblings")]
    _, before = obeyed(seen.before, study.expected("siblings"), [study.group])
    _, after = obeyed(seen.after, study.expected("siblings"), [study.group])
    found = {}
    for label in seen.before.groups[study.group]:
        chosen = torch.tensor([other == label for other in labels])
        if chosen.any():
            found[label] = Comparison.of(before[chosen], after[chosen])
    return found


def _drift(moved: Tensor) -> Drift:
    pixels, *others = moved.mean(dim=0).tolist()
    apart, cosine = (None if math.isnan(value) else value for value in others)
    return Drift(pixels=pixels, pixels_apart=apart, cosine=cosine, n=len(moved))


def _criteria(study: ErasureStudy, rates: Mapping[str, Comparison]) -> list[Criterion]:
    name, bars = f"“{study.concept}”", study.bars
    target = rates["target"]
    before = f"How often does the base model draw {name} when asked?"
    found = [
        rate_criterion("drawn before", before, target.before, bars.drawn_before, at_least=True),
        rate_criterion("target", f"How often is {name} still drawn when asked for?", target.after, bars.target),
    ]
    if "synonyms" in rates:
        question = f"How often is {name} still drawn in other words?"
        found.append(rate_criterion("synonyms", question, rates["synonyms"].after, bars.synonyms))
    for role, question, bar in (
        ("siblings", f"How much accuracy do the other labels of “{study.group}” lose?", bars.siblings_loss),
        ("untouched", f"How much does the rest of the prompts for {name} lose?", bars.untouched_loss),
        ("unrelated", f"How much do prompts lose that do not concern {name}?", bars.unrelated_loss),
    ):
        if role in rates:
            found.append(loss_criterion(role, question, rates[role].change, bar))
    for rate, images in (("rejected", f"images for {name}"), ("rejected elsewhere", "of the other images")):
        if rate in rates:
            question = f"How many more {images} are none of the labels (broken, or off the map)?"
            found.append(rise_criterion(rate, question, rates[rate].change, bars.rejected_rise))
    return found


def measure_erasure(
    study: ErasureStudy,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    detector: Detector,
    *,
    extractor: Extractor | None = None,
) -> ErasureResult:
    """Judges an erasure from images that exist already.

    Args:
        study: what the images were asked to show.
        before: role -> the base model's images (prompts x seeds, 3, H, W) in [0, 1], seed after seed.
        after: the same from the edited model: same prompts, same seeds, same order.
        detector: what judges.
        extractor: features for the drift on unrelated prompts.

    Returns:
        The result, without examples.

    Raises:
        ValueError: if the images do not fit the study or each other, or the detector does not know the concept.
    """
    study.check(detector.groups)
    if set(before) != set(after):
        raise ValueError(f"before has the roles {list(before)}, after has {list(after)}; give the same")
    return judge(study, {role: observe(before[role], after[role], detector, extractor) for role in before})


def run(
    study: ErasureStudy,
    generate_before: Generate,
    generate_after: Generate,
    detector: Detector,
    progress: Progress | None = None,
    *,
    extractor: Extractor | None = None,
    examples: int = 4,
) -> ErasureResult:
    """Generates with both models, role by role and seed by seed, and judges; images are dropped once they are read.

    Args:
        study: what to ask.
        generate_before: the base model.
        generate_after: the edited model.
        detector: what judges.
        progress: called before each call of a model, and once at the end.
        extractor: features for the drift on unrelated prompts.
        examples: image pairs of the first seed to keep per role.

    Returns:
        The result.

    Raises:
        ValueError: if the detector does not know the concept, or a model returns too few or too many images.
    """
    study.check(detector.groups)
    total, done = 2 * len(study.roles) * len(study.seeds), 0
    kept: list[Example] = []
    seen: dict[str, list[Observation]] = {role: [] for role in study.roles}
    for role in study.roles:
        texts = study.prompts[role].texts
        for seed in study.seeds:
            images = []
            for which, draw in (("before", generate_before), ("after", generate_after)):
                if progress is not None:
                    progress(done, total, f"{role}, {which}, seed {seed}")
                images.append(draw(texts, seed))
                done += 1
                if len(images[-1]) != len(texts):
                    raise ValueError(f"{which}: {len(images[-1])} images for {len(texts)} prompts; return one each")
            seen[role].append(observe(images[0], images[1], detector, extractor))
            if seed == study.seeds[0]:
                triples = list(zip(texts, *images, strict=True))[:examples]
                # Copies: a view would keep the images of all prompts.
                kept += [
                    Example(role, text, seed, one.cpu().clone(), other.cpu().clone()) for text, one, other in triples
                ]
    if progress is not None:
        progress(total, total, "done")
    result = judge(study, {role: Observation.cat(parts) for role, parts in seen.items()})
    return replace(result, examples=tuple(kept))
