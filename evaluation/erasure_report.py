"""Turns the result of an erasure study into a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sublimate.evaluation.drawing import Generate
from sublimate.evaluation.erasure_result import Comparison, ErasureResult
from sublimate.evaluation.hardware import hardware_line
from sublimate.evaluation.intervals import Rate
from sublimate.evaluation.report import Report
from sublimate.evaluation.report_sections import Cell, PictureRow, Pictures, Section, Table, Verdict
from sublimate.pipelines.versions import versions

NOT_TRIED = (
    "prompts searched for by an attacker (black-box or by gradient)",
    "embeddings learned to bring the concept back (textual inversion)",
    "fine-tuning the edited weights, on the concept or on anything else",
    "images as a start (img2img, inpainting), adapters and other samplers",
)
"""What an erasure study alone leaves open."""

_ROLES = {
    "target": "Asked for “{}”",
    "synonyms": "Asked for “{}” in other words",
    "siblings": "The neighbours of “{}”",
    "unrelated": "Prompts that have nothing to do with “{}”",
}

_NAMES = {
    "target": "concept seen when asked for",
    "synonyms": "concept seen in other words",
    "siblings": "other labels of its group obeyed",
    "untouched": "rest of the concept's prompts obeyed",
    "unrelated": "unrelated prompts obeyed",
    "rejected": "images that are none of the labels",
    "rejected elsewhere": "other images that are none of the labels",
}


def example_pictures(
    result: ErasureResult,
    *,
    columns: tuple[str, str] = ("base", "edited"),
    students: Mapping[str, Generate] | None = None,
) -> tuple[Pictures, ...]:
    """The kept examples side by side, one section per role.

    Args:
        result: with examples.
        columns: what to call the two models of the study.
        students: further models by name; each draws the same prompts with the same seeds.

    Returns:
        Sections in the order of the roles.
    """
    sections = []
    for role in dict.fromkeys(example.role for example in result.examples):
        examples = [example for example in result.examples if example.role == role]
        texts, seed = [example.prompt for example in examples], examples[0].seed
        drawn = [
            torch.stack([example.before for example in examples]),
            torch.stack([example.after for example in examples]),
            *(generate(texts, seed).cpu() for generate in (students or {}).values()),
        ]
        rows = tuple(
            PictureRow(f"“{text}”", images) for text, images in zip(texts, zip(*drawn, strict=True), strict=True)
        )
        note = f"Each card is one prompt, drawn from the same noise (seed {seed})."
        title = _ROLES[role].format(result.study.concept)
        sections.append(Pictures(title, (*columns, *(students or {})), rows, note))
    return tuple(sections)


def erasure_report(
    result: ErasureResult,
    *,
    command: str,
    title: str | None = None,
    lead: str = "",
    pictures: Sequence[Section] | None = None,
    more: Sequence[Section] = (),
    tried: Sequence[str] = (),
    not_tried: Sequence[str] = NOT_TRIED,
    provenance: Mapping[str, str] | None = None,
    verdict: Verdict | None = None,
) -> Report:
    """A report with the verdict, the pictures and every rate of a study.

    Args:
        result: of `sublimate.evaluation.erasure.run`.
        command: what makes the report again.
        title: unless given, "Erasing ..." with the concept's name.
        lead: a sentence under the title: which model, which method.
        pictures: sections to show instead of the result's own examples.
        more: sections after the tables (fidelity, attacks, a student).
        tried: what else was measured, beside the study's prompts.
        not_tried: what was left out.
        provenance: base model and its hash, the edit, the detector; seeds, versions and hardware are added.
        verdict: of an erasure that was attacked; unless given, the result's own.

    Returns:
        The report; `write` puts it on disk.
    """
    study = result.study
    seeds = f"{len(study.seeds)} seed{'s' * (len(study.seeds) > 1)}"
    asked = tuple(f"{len(study.prompts[role].texts)} {role} prompts, {seeds}" for role in study.roles)
    found = {"seeds": ", ".join(map(str, study.seeds)), "hardware": hardware_line()}
    found |= {name: version for name, version in versions().items() if version != "not installed"}
    return Report(
        title=title or f"Erasing “{study.concept}”",
        command=command,
        lead=lead,
        sections=(
            Verdict(result.criteria, result.verdict) if verdict is None else verdict,
            *(example_pictures(result) if pictures is None else pictures),
            *result_tables(result),
            *more,
        ),
        tried=(*asked, *tried),
        not_tried=tuple(not_tried),
        provenance={**(provenance or {}), **found},
    )


def result_tables(result: ErasureResult) -> list[Table]:
    """Every rate of a study: before and after, label by label, what is drawn instead, and the drift."""
    name = result.study.concept
    tables = [
        Table(
            "All rates, before and after",
            ("what is counted", "base", "edited", "change, paired"),
            tuple(_row(_NAMES[role], comparison) for role, comparison in result.rates.items()),
        )
    ]
    if result.siblings:
        tables.append(
            Table(
                f"The neighbours of “{name}”, one by one",
                ("label", "base", "edited", "change, paired"),
                tuple(_row(label, comparison) for label, comparison in result.siblings.items()),
            )
        )
    total = sum(result.drawn_instead.values())
    instead = tuple((label, Rate(count, total)) for label, count in result.drawn_instead.items() if count)
    tables.append(Table(f"What is drawn where “{name}” is asked for", ("label", "share of the images"), instead))
    if result.drift:
        drift = result.drift
        rows = (
            ("pixels, root mean square", drift.pixels, drift.pixels_apart),
            ("features, cosine similarity", drift.cosine, None),
        )
        tables.append(
            Table(
                "How far unrelated images moved",
                ("distance", "base to edited, same prompt and noise", "between different images of the base"),
                tuple(row for row in rows if row[1] is not None),
                f"Mean over {drift.n} pairs; pixels in [0, 1].",
            )
        )
    return tables


def _row(name: str, comparison: Comparison) -> tuple[Cell, ...]:
    return name, comparison.before, comparison.after, comparison.change
