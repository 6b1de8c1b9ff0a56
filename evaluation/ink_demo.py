"""The demo on Ink: an edited teacher, its one-step student, and one report that judges both."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from sublimate.erasure.eraser import Eraser
from sublimate.erasure.request import Concept, Request
from sublimate.evaluation.detectors import open_detector
from sublimate.evaluation.drawing import Generate, drawing
from sublimate.evaluation.erasure import run
from sublimate.evaluation.erasure_report import erasure_report, example_pictures, result_tables
from sublimate.evaluation.erasure_result import ErasureResult
from sublimate.evaluation.ink_study import ink_study
from sublimate.evaluation.report_sections import Verdict
from sublimate.evaluation.studies import ErasureStudy, PromptSet
from sublimate.pipelines.cards import public_values
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.edit import Edit
from sublimate.pipelines.model import open_model
from sublimate.training import registry
from sublimate.training.config import load_config
from sublimate.training.distill import DistillConfig, distill
from sublimate.training.ink.captions import prompts
from sublimate.training.ink.vocabulary import GROUPS, SYNONYMS, locate

ERASERS = "sublimate.erasure.methods"
_FORMS, _FORMS_EACH = 32, 10
# What these train leads away from whole prompts: whatever else one names would go with the concept.
_LEADING_AWAY = ("adv_unlearn", "esd", "few_shot", "receler")


def ink_request(*concepts: str) -> Request:
    """The request that erases some of Ink's concepts: anchors are the next labels that stay, siblings are preserved.

    Raises:
        ValueError: if Ink does not know a concept, or of a group none is left.
    """
    places = [locate(concept) for concept in concepts]
    erased = {GROUPS[group][index] for group, index in places}
    erase: list[Concept] = []
    preserve: dict[str, Concept] = {}
    for group, index in places:
        labels = GROUPS[group]
        kept = [label for label in (*labels[index:], *labels[:index]) if label not in erased]
        if not kept:
            raise ValueError(f"Nothing would be left of the {group}s: keep one as the anchor of the others.")
        name = labels[index]
        erase.append(Concept(name, kept[0], _others(name)))
        preserve |= {label: Concept(label, synonyms=_others(label)) for label in labels if label in kept}
    return Request(erase=tuple(erase), preserve=tuple(preserve.values()))


def ink_forms(concept: str, count: int = 32, *, unnamed: Collection[str] = ()) -> tuple[str, ...]:
    """Templates with `{}` for one of Ink's concepts: captions that name it, with the name left open.

    Args:
        concept: by any of its words.
        count: how many, at most.
        unnamed: words that the captions do not say. With all words of all concepts there are few.

    Raises:
        ValueError: if Ink does not know the concept.
    """
    group, index = locate(concept)
    name = GROUPS[group][index]
    words = re.compile(rf"\b({'|'.join(sorted(SYNONYMS[name], key=len, reverse=True))})\b")
    unnamed = set(unnamed)
    forms = {"{}": None}
    for caption in prompts(200 * count, 1, **{group: name}):  # type: ignore[arg-type]
        form, times = words.subn("{}", caption.text)
        if times == 1 and not unnamed.intersection(re.findall(r"\w+", form)):
            forms[form] = None
    return tuple(forms)[:count]


def ink_eraser(method: str, overrides: Sequence[str] = (), concepts: Sequence[str] = ()) -> Eraser:
    """An eraser with the options packaged for Ink (`configs/erase/ink_<method>.yaml`).

    Args:
        method: an eraser's name.
        overrides: `key=value` changes to those options.
        concepts: what it will erase. The packaged templates are for digits; where others are among the concepts,
            templates become captions that name each of them. None says another of the concepts: what is preserved is
            put in there too, and would preserve that one with it. Where the eraser leads away from whole prompts, none
            names anything else.

    Raises:
        ValueError: if there is no such eraser, or no options for Ink.
    """
    found = registry.load(ERASERS, method, Eraser)
    config: Any = load_config(found.Config, f"ink_{method}", overrides, kind="erase")
    if any(locate(concept)[0] != "digit" for concept in concepts):
        labels = SYNONYMS if method in _LEADING_AWAY else [one.name for one in ink_request(*concepts).erase]
        unnamed = [word for label in labels for word in SYNONYMS[label]]
        each = max(_FORMS // len(concepts), _FORMS_EACH)
        forms = dict.fromkeys(form for concept in concepts for form in ink_forms(concept, each, unnamed=unnamed))
        if "templates" in found.Config.model_fields:
            config = config.model_copy(update={"templates": tuple(forms)})
        elif "templates" in getattr(config, "options", {}):  # those of an eraser within
            config = config.model_copy(update={"options": {**config.options, "templates": list(forms)}})
    return found(config)


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
    eraser = ink_eraser(method, concepts=[concept])
    if eraser.attaches:
        raise ValueError(
            f"{method} makes an attachment, and the demo's student is a folder of stock classes: choose another."
        )
    name = request.erase[0].name
    _check_unused(folder / "edit.safetensors", method, eraser, request)
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
            Verdict(second.criteria, second.verdict, title="One-step student: verdict"),
            *(replace(table, title=f"One-step student: {table.title}") for table in result_tables(second)),
        ),
        tried=("one-step distillation of the edited teacher",),
        provenance={"base": base.source, "base hash": base.content_hash()},
    )
    for title, result in results.items():
        say(f"{title}: {result.verdict}")
    return report.write(folder)


def _check_unused(path: Path, method: str, eraser: Eraser, request: Request) -> None:
    """Refuses a folder in which another concept was erased, or otherwise: its student would stand beside this edit."""
    if not path.is_file():
        return
    made = Edit.load(path).provenance
    asked = {
        "method": method,
        "config": public_values(eraser.config.model_dump(mode="json")),
        "request": request.to_dict(paths=False),
    }
    if any(made.get(key) != value for key, value in asked.items()):
        raise ValueError(f"{path.parent} holds another demo: give another --out, or delete it.")


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
