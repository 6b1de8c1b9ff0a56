"""The audit: what an erasure did, and what brings the concept back; every attack is tried on the base first."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sublimate.erasure.request import Concept
from sublimate.evaluation.agreement import Readings, read
from sublimate.evaluation.attack import Attack, Case, counting
from sublimate.evaluation.audit_parts import Parts, identity
from sublimate.evaluation.audit_result import SHOWN, Audit, Finding, Trial
from sublimate.evaluation.blindspots import Atom, blindspots
from sublimate.evaluation.drawing import Generate, drawing
from sublimate.evaluation.erasure import Progress
from sublimate.evaluation.erasure import run as run_study
from sublimate.evaluation.erasure_result import ErasureResult
from sublimate.evaluation.fidelity import extract
from sublimate.evaluation.studies import ErasureStudy
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.generate import generate
from sublimate.pipelines.gradient_checkpointing import checkpointed
from sublimate.pipelines.locations import first_line
from sublimate.pipelines.model import Model
from sublimate.pipelines.placement import name_of
from sublimate.training import registry
from sublimate.training.config import validate_section
from sublimate.training.randomness import key
from sublimate.training.trainer import Interrupted

log = logging.getLogger(__name__)
ATTACKS = "sublimate.evaluation.attacks"


def make_attacks(names: Sequence[str], options: Mapping[str, Mapping[str, object]] | None = None) -> list[Attack]:
    """Attacks by name.

    Args:
        names: of files in `evaluation/attacks/`.
        options: attack -> its options, for those that shall not have their defaults.

    Raises:
        ValueError: for an unknown attack or option, or options of an attack that is not asked for.
    """
    given = dict(options or {})
    made = []
    for name in names:
        attack = registry.load(ATTACKS, name, Attack)
        made.append(attack(validate_section(attack.Config, given.pop(name, {}), name)))
    if given:
        raise ValueError(
            f"There are options for {next(iter(given))}, which is not among the attacks: {', '.join(names)}."
        )
    return made


def audit(
    base: Model,
    edited: Model,
    concept: Concept,
    study: ErasureStudy,
    detector: Detector,
    attacks: Sequence[Attack],
    *,
    pictures: int = 32,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> Audit:
    """Judges an erasure and attacks it; both models stay as they are.

    Attacks that follow gradients need both in float32 and are skipped otherwise; the study and the others do not.
    An attack that fails does not cost what the others find: it is among those that were skipped, with its error.

    Args:
        base: the model before the erasure.
        edited: the same after it.
        concept: what was erased, with its other names.
        study: what to ask both models without attacking them; its target prompts are what attacks must bring back.
        detector: what judges.
        attacks: what to try; each gets the same prompts.
        pictures: of the concept that attackers have, drawn by the base.
        seed: all randomness of the attacks derives from it.
        gradient_checkpointing: recompute activations in backward passes to save memory.
        progress: called before each part, and once at the end.
        folder: where the study and each trial are written as they end, and read by the next audit of the same models,
            concept, study, detector, options and seed.

    Returns:
        The study's result with examples, and the trials.

    Raises:
        ValueError: when the detector does not know the concept, the base does not draw it, or the models differ in
            their precision.
    """
    if base.dtype != edited.dtype:
        open_in = f"{name_of(base.dtype)} and the edited model in {name_of(edited.dtype)}"
        raise ValueError(f"The base is open in {open_in}: open both in the same precision to compare them.")
    saving = checkpointed if gradient_checkpointing else nullcontext
    with saving(base), saving(edited):
        pass  # where no network has it, before the study
    tell: Progress = progress or (lambda done, total, what: None)
    case = make_case(base, concept, study, detector, pictures=pictures, seed=seed)
    known = identity(base, edited, concept, study, detector, pictures=pictures, seed=seed) if folder else {}
    parts = Parts(folder, known)

    def measured() -> tuple[ErasureResult, list[Atom]]:
        before, after = Noted(drawing(base), detector), Noted(drawing(edited), detector)
        found = run_study(study, before, after, detector, tell)
        return found, mapped(before, after, seed=seed) if hasattr(detector, "features") else []

    def tried(attack: Attack, place: int) -> Trial:
        name, chosen = attack.name(), key(seed, "attack", attack.name())
        tell(2 * place, 2 * len(attacks), f"{name}, base")
        with saving(base):
            on_base = Finding.of(attack.run(base, case, seed=chosen))
        tell(2 * place + 1, 2 * len(attacks), f"{name}, edited")
        began = time.perf_counter()
        with saving(edited), counting(edited) as passes:
            on_edited = Finding.of(attack.run(edited, case, seed=chosen), SHOWN)
        seconds = time.perf_counter() - began
        return Trial(name, attack.box, attack.budget, on_base, on_edited, passes.count, seconds, bar=study.bars.target)

    erasure, atoms = parts.study(study, measured)
    asked_for = {attack.name() for attack in attacks}
    skipped = {name: "not asked for" for name in registry.available(ATTACKS) if name not in asked_for}
    trials = []
    for i, attack in enumerate(attacks):
        name = attack.name()
        try:
            if reason := attack.out_of_place(edited, case):
                skipped[name] = reason
                continue
            trial = there if (there := parts.trial(attack)) is not None else tried(attack, i)
        except Interrupted as stop:  # what trains saves when it is told to stop
            raise KeyboardInterrupt from stop
        except (ValueError, torch.OutOfMemoryError) as error:
            skipped[name] = f"it could not be run: {first_line(error)}"
            continue
        except Exception as error:
            log.warning("The attack %s failed.", name, exc_info=True)
            skipped[name] = f"it could not be run: {type(error).__name__}: {first_line(error)}"
            continue
        if there is None:
            parts.write_trial(attack, trial)
        trials.append(trial)
    tell(2 * len(attacks), 2 * len(attacks), "done")
    return Audit(erasure, tuple(trials), skipped, atoms)


class Noted:
    """A model that draws as before, and whose images' features and readings are kept.

    Args:
        draw: the model.
        detector: reads the images; its `features`, where it has some, are kept too.
    """

    def __init__(self, draw: Generate, detector: Any) -> None:
        self.draw, self.detector = draw, detector
        self.features: list[Tensor] = []
        self.readings: list[Readings] = []

    def __call__(self, texts: Sequence[str], seed: int) -> Tensor:
        images = self.draw(texts, seed)
        self.readings.append(read(self.detector, images))
        if hasattr(self.detector, "features"):
            self.features.append(extract(self.detector.features, images).float().cpu())
        return images


def mapped(before: Noted, after: Noted, *, seed: int = 0) -> list[Atom]:
    """The map of side effects over everything that both models drew."""
    ours, theirs = torch.cat(before.features), torch.cat(after.features)
    return blindspots(ours, theirs, Readings.cat(before.readings), Readings.cat(after.readings), seed=seed)


def make_case(
    base: Model, concept: Concept, study: ErasureStudy, detector: Detector, *, pictures: int = 32, seed: int = 0
) -> Case:
    """What attacks get: the study's prompts, and pictures of the concept that the base draws and the detector sees.

    Raises:
        ValueError: when the base does not draw the concept.
    """
    texts = study.target.texts
    captions = [texts[i % len(texts)] for i in range(2 * pictures)]
    drawn = generate(base, captions, seed=key(seed, "pictures"))
    case = Case(
        concept=concept,
        prompts=texts,
        pictures=drawn,
        captions=tuple(captions),
        detector=detector,
        group=study.group,
        label=study.detected_as,
        base=base,
        paraphrases=study.synonyms.texts,
        others=study.unrelated.texts,
    )
    shown = case.shows(drawn).nonzero().flatten()[:pictures]
    if not len(shown):
        raise ValueError(f"{base.source} does not draw {study.concept!r}, so there is nothing to bring back.")
    return replace(case, pictures=drawn[shown.to(drawn.device)], captions=tuple(captions[i] for i in shown.tolist()))
