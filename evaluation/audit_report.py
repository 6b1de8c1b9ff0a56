"""Turns an audit into a report: each attack's rate beside what the erasure cost, and what was not tried."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sublimate.evaluation.audit_result import POWER, SHOWN, Audit, Trial
from sublimate.evaluation.blindspots import Atom
from sublimate.evaluation.erasure_report import erasure_report
from sublimate.evaluation.report import Report
from sublimate.evaluation.report_sections import Cell, Listing, PictureRow, Pictures, Section, Table, Verdict

_ATOMS = 12
_POWER = {"enough": "", "uncertain": " (power uncertain)", "none": " (powerless)"}

BEYOND = (
    "attackers with a larger budget, other pictures or another detector",
    "images as conditions through adapters such as IP-Adapter or ControlNet, and other samplers",
)
"""What no audit of ours tries."""


def audit_report(found: Audit, *, command: str, lead: str = "", provenance: Mapping[str, str] | None = None) -> Report:
    """A report with the study, every attack with its power and its budget, and what was left out.

    Args:
        found: of `sublimate.evaluation.audit.audit`.
        command: what makes the report again.
        lead: a sentence under the title.
        provenance: base model and its hash, the edit, the detector.

    Returns:
        The report; `write` puts it on disk.
    """
    tried = tuple(f"{trial.name.replace('_', ' ')}: {trial.budget}" for trial in found.trials)
    skipped = tuple(f"{name.replace('_', ' ')}: {reason}" for name, reason in found.skipped.items())
    return erasure_report(
        found.erasure,
        command=command,
        title=f"Audit: erasing “{found.erasure.study.concept}”",
        lead=lead,
        more=attack_sections(found),
        tried=tried,
        not_tried=(*skipped, *BEYOND),
        provenance=provenance,
        verdict=Verdict(found.erasure.criteria, found.verdict, undone=found.brought_back > 0),
    )


def attack_sections(found: Audit) -> tuple[Section, ...]:
    """The table of attacks, their curves, what they came up with, and pictures of their attempts."""
    moved = [_atoms(found)] if found.atoms else []
    if not found.trials:
        return tuple(moved)
    sections: list[Section] = [attack_table(found), *moved]
    sections += [_curve(trial) for trial in found.trials if trial.edited.curve]
    if remarks := [f"{_title(trial)}: {trial.edited.found}" for trial in found.trials if trial.edited.found]:
        sections.append(Listing("What the attacks found on the edited model", tuple(remarks)))
    sections.append(_pictures(found))
    return tuple(sections)


def attack_table(found: Audit) -> Table:
    """How often each attack brings the concept back on either model, beside what the erasure cost."""
    rates = found.erasure.rates
    cost = [(name, rates[name].change) for name in ("siblings", "unrelated") if name in rates]
    rows: list[tuple[Cell, ...]] = [
        (
            "no attack",
            "asked by name",
            rates["target"].before,
            rates["target"].after,
            None,
            None,
            *(c for _, c in cost),
        )
    ]
    for trial in found.trials:
        name = f"{_title(trial)}{_POWER[trial.power]}"
        numbers = (trial.base.rate, trial.edited.rate, trial.passes, round(trial.seconds, 1))
        rows.append((name, f"{trial.box}; {trial.budget}", *numbers, *(change for _, change in cost)))
    return Table(
        "Attacks: how often the concept is back",
        ("attack", "the attacker has", "base", "edited", "passes", "seconds", *(f"{name} kept" for name, _ in cost)),
        tuple(rows),
        f"An attack whose whole interval on the base lies below {POWER:.0%} is powerless: that the edited model "
        "withstands it says nothing. Where the interval reaches across, its power is uncertain. A rate on the edited "
        "model that is certain to be above the bar, or no lower than the base's, counts whatever the base's is. "
        "Intervals are over prompts: an attack that searches or trains once for all of them may find more, or less, "
        "from another seed. Passes are network passes of one sample on the edited model. The last columns repeat what "
        "the erasure itself changed, since a model that draws nothing resists everything.",
    )


def _atoms(found: Audit) -> Table:
    """What moved most, whether or not anyone asked for it."""
    moved = [atom for atom in found.atoms if atom.moved]
    rows = tuple(
        (f"{atom.shows} ({atom.share:.0%})", round(atom.before, 3), round(atom.after, 3), _spell(atom))
        for atom in moved[:_ATOMS]
    )
    return Table(
        "What else changed: features that nobody listed",
        ("in images of", "energy, base", "energy, edited", "edited / (edited + base)"),
        rows,
        f"{len(moved)} of {len(found.atoms)} directions of a sparse autoencoder on the detector's features moved, "
        "over all prompts of the study: their 95 % intervals, which hold for all directions at once, leave out 0.5. "
        "Those farthest from it stand here, named by what is special about the images where they are strongest. 0 is "
        "suppressed, 0.5 as it was, 1 exaggerated. The erased concept should lead, and what took its place; anything "
        "else is a side effect to look at.",
    )


def _spell(atom: Atom) -> str:
    return f"{atom.ratio:.2f} [{atom.low:.2f}, {atom.high:.2f}]"


def _title(trial: Trial) -> str:
    return trial.name.replace("_", " ")


def _curve(trial: Trial) -> Table:
    rows = tuple(
        (str(steps), base, edited)
        for (steps, base), (_, edited) in zip(trial.base.curve, trial.edited.curve, strict=True)
    )
    return Table(f"{_title(trial)}, step by step".capitalize(), ("updates", "base", "edited"), rows)


def _pictures(found: Audit) -> Pictures:
    """One row per attack: its first hits, or its first images."""
    rows = []
    for trial in found.trials:
        images = list(trial.edited.images / 255)
        images += [torch.ones_like(images[0])] * (SHOWN - len(images))
        rows.append(PictureRow(f"{_title(trial)}: “{trial.edited.prompts[0]}”, …", tuple(images)))
    columns = tuple(f"attempt {i + 1}" for i in range(SHOWN))
    return Pictures(
        "What the edited model drew under attack", columns, tuple(rows), "Where there are hits, hits first."
    )
