"""The demo on Ink: an edited teacher, its one-step student, and one report that judges both."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from tqdm.auto import tqdm

from sublimate.erasure.eraser import Eraser
from sublimate.erasure.request import Concept, Request
from sublimate.evaluation.detectors import open_detector
from sublimate.evaluation.erasure import Generate, run
from sublimate.evaluation.erasure_report import erasure_report, example_pictures, result_tables
from sublimate.evaluation.erasure_result import ErasureResult
from sublimate.evaluation.ink_study import ink_study
from sublimate.evaluation.report_sections import Verdict
from sublimate.evaluation.studies import ErasureStudy, PromptSet
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model, open_model
from sublimate.training import registry
from sublimate.training.config import load_config
from sublimate.training.distill import DistillConfig, distill
from sublimate.training.ink.vocabulary import GROUPS, SYNONYMS, locate

ERASERS = "sublimate.erasure.methods"


def ink_request(concept: str) -> Request:
    """The request that erases one of Ink's concepts: the next label as anchor, all its siblings preserved.

    Raises:
        ValueError: if Ink does not know the concept.
    """
    group, index = locate(concept)
    labels = GROUPS[group]
    name, anchor = labels[index], labels[(index + 1) % len(labels)]
    siblings = tuple(Concept(label, synonyms=_others(label)) for label in labels if label != name)
    return Request(erase=(Concept(name, anchor, _others(name)),), preserve=siblings)


def ink_eraser(method: str, overrides: Sequence[str] = ()) -> Eraser:
    """An eraser with the options packaged for Ink (`configs/erase/ink_<method>.yaml`).

    Args:
        method: an eraser's name.
        overrides: `key=value` changes to those options.

    Raises:
        ValueError: if there is no such eraser, or no options for Ink.
    """
    found = registry.load(ERASERS, method, Eraser)
    return found(load_config(found.Config, f"ink_{method}", overrides, kind="erase"))


def _others(label: str) -> tuple[str, ...]:
    return tuple(word for word in SYNONYMS[label] if word != label)


def run_demo(
    concept: str,
    folder: Path,
    *,
    method: str = "uce",
    n: int = 300,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Path:
    """Erases, distils and measures; writes `edit.safetensors`, `student/`, `report.html` and `report.json`.

    Args:
        concept: a digit, an ink or a style, by any of its words.
        folder: where everything goes; an interrupted distillation resumes from there.
        method: an eraser, with the options packaged for Ink.
        n: prompts per model: half for the concept itself, the rest for synonyms, siblings and unrelated prompts.
        overrides: `key.sub=value` changes to the packaged configuration `demo` of the distillation.
        say: told what is being done.

    Returns:
        The report's page.

    Raises:
        ValueError: if Ink does not know the concept, or there is no such eraser.
    """
    request = ink_request(concept)
    eraser = ink_eraser(method)
    if eraser.attaches:
        raise ValueError(
            f"{method} makes an attachment, and the demo's student is a folder of stock classes: choose another."
        )
    name = request.erase[0].name
    config = load_config(DistillConfig, "demo", [f"trainer.output_dir={folder / 'distill'}", *overrides])
    base, edited, detector = open_model("ink"), open_model("ink"), open_detector("ink")

    place = f"; in its place: {request.erase[0].anchor!r}" if eraser.uses_anchor else ""
    say(f"1/3 Erasing {name!r} with {method}{place}.")
    edit = eraser.fit(base, request, progress=True)
    folder.mkdir(parents=True, exist_ok=True)
    edit.save(folder / "edit.safetensors")
    edit.apply(edited)

    say("2/3 Distilling the edited teacher to one step; the real class is its own samples.")
    student = open_model(str(distill(config, edited)))

    say(f"3/3 Measuring with {n} prompts per model.")
    study = sized(ink_study(concept, n=n), n)
    draw_base = remembering(drawing(base))
    results = {
        "Edited teacher": _measured(study, draw_base, drawing(edited), detector),
        "One-step student of the edited teacher": _measured(study, draw_base, drawing(student), detector),
    }
    first, second = results.values()
    command = ["sublimate", "demo", concept, "--method", method, "--n", str(n), "--out", str(folder)]
    command += [word for change in overrides for word in ("--set", change)]
    report = erasure_report(
        first,
        command=shlex.join(command),
        lead=f"{method.upper()} on Ink's teacher, then one-step f-distill of what it left.",
        pictures=example_pictures(first, students={"one-step student": drawing(student)}),
        more=(
            Verdict(second.criteria, title="One-step student: verdict"),
            *(replace(table, title=f"One-step student: {table.title}") for table in result_tables(second)),
        ),
        tried=("one-step distillation of the edited teacher",),
        provenance={"base": base.source, "base hash": base.content_hash()},
    )
    for title, result in results.items():
        say(f"{title}: {Verdict(result.criteria).sentence}")
    return report.write(folder)


def sized(study: ErasureStudy, n: int) -> ErasureStudy:
    """The study with n prompts in all: half for the target, the rest shared by the other roles."""
    others = n // 2 // 3
    return replace(
        study,
        target=_first(study.target, n - 3 * others),
        synonyms=_first(study.synonyms, others),
        siblings=_first(study.siblings, others),
        unrelated=_first(study.unrelated, others),
    )


def _first(prompts: PromptSet, size: int) -> PromptSet:
    return PromptSet(prompts.texts[:size], prompts.expected[:size])


def drawing(model: Model) -> Generate:
    """The model as a study calls it, sampled as its checkpoint asks."""
    return lambda texts, seed: generate(model, texts, seed=seed)


def remembering(draw: Generate) -> Generate:
    """Draws the same prompts and seed only once, for models that are compared with several others."""
    drawn: dict[tuple[tuple[str, ...], int], Tensor] = {}

    def remembered(texts: Sequence[str], seed: int) -> Tensor:
        key = (tuple(texts), seed)
        if key not in drawn:
            drawn[key] = draw(texts, seed)
        return drawn[key]

    return remembered


def _measured(study: ErasureStudy, before: Generate, after: Generate, detector: Detector) -> ErasureResult:
    with tqdm(desc="measuring", unit="draw") as bar:

        def show(done: int, total: int, what: str) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(what)

        return run(study, before, after, detector, show)
