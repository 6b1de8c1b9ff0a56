"""Erasure studies for Ink's concepts, written from its own grammar, so that every prompt carries its ground truth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sublimate.evaluation.detectors import open_detector
from sublimate.evaluation.drawing import Generate
from sublimate.evaluation.quality import Quality, measure_quality
from sublimate.evaluation.studies import Bars, ErasureStudy, PromptSet
from sublimate.pipelines.detector import Detector
from sublimate.training.ink.captions import Caption, prompts
from sublimate.training.ink.detector import InkDetector
from sublimate.training.ink.vocabulary import GROUPS, locate
from sublimate.training.ink.world import sample


def ink_prompts(captions: Iterable[Caption]) -> PromptSet:
    """A prompt set from captions of Ink: what a caption states is what its image should show."""
    chosen = tuple(captions)
    expected = tuple(
        {group: GROUPS[group][index] for group, index in caption.mentions._asdict().items() if index is not None}
        for caption in chosen
    )
    return PromptSet(tuple(caption.text for caption in chosen), expected)


def ink_study(
    concept: str, *, n: int = 200, seeds: tuple[int, ...] = (0,), seed: int = 0, bars: Bars | None = None
) -> ErasureStudy:
    """What to ask about one of Ink's concepts.

    Args:
        concept: a digit, an ink or a style, by any of its words ("seven", "7", "scarlet").
        n: prompts per role; 189 or more can show a rate of at most 2 % (`evaluation.intervals.images_needed`).
        seeds: every prompt is drawn once per seed.
        seed: what the prompts are drawn from.
        bars: what the result is held to; `Bars()` unless given.

    Returns:
        Target prompts in the forms the teacher was trained on, synonyms in forms it never saw, siblings with every
        other label of the group, and unrelated prompts that do not mention the group at all.

    Raises:
        ValueError: if Ink does not know the concept.
    """
    group, index = locate(concept)
    name = GROUPS[group][index]
    asking: dict[str, Any] = {group: name}
    return ErasureStudy(
        concept=name,
        group=group,
        target=ink_prompts(prompts(n, seed, **asking)),
        synonyms=ink_prompts(prompts(n, seed + 1, paraphrased=True, **asking)),
        siblings=ink_prompts(prompts(n, seed + 2, naming=(group,), exclude=(name,))),
        unrelated=ink_prompts(_without(group, n, seed + 3)),
        seeds=seeds,
        bars=bars or Bars(),
    )


def ink_quality(
    generate: Generate, detector: Detector | None = None, *, n: int = 5000, judged: int = 2000, seed: int = 0
) -> Quality:
    """How well a model draws Ink: captions of the grammar, judged by Ink's detector against held-out handwriting.

    Args:
        generate: the model.
        detector: Ink's, where it is open already.
        n: images for the distances.
        judged: how many of them are judged for agreement.
        seed: of prompts and images.
    """
    detector = open_detector("ink") if detector is None else detector
    if not isinstance(detector, InkDetector):
        raise ValueError("Ink's grammar is judged by Ink's own detector: give prompts of your own for another.")
    return measure_quality(
        generate,
        ink_prompts(prompts(n, seed)),
        lambda count: sample(range(count), "held_out", seed)[0],
        detector,
        detector.features,
        judged=judged,
        seed=seed,
    )


def _without(group: str, n: int, seed: int) -> list[Caption]:
    """Captions that say nothing about a group, kept from a larger draw."""
    size = 4 * n
    while True:
        kept = [caption for caption in prompts(size, seed) if getattr(caption.mentions, group) is None]
        if len(kept) >= n:
            return kept[:n]
        size *= 2
