"""Measures every eraser on three kinds of concept, attacks what they made, and distils it.

A resumable queue: every cell writes one JSON file under `results/erasure/` and is skipped when that exists.

    python benchmarks/erasure.py                  # all cells
    python benchmarks/erasure.py --only uce       # cells whose name contains "uce"
    python benchmarks/erasure.py --table          # the tables of what is there
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ink import within_budget
from safetensors.torch import load_file, save_file
from torch import Tensor

from sublimate.evaluation.attack import counting
from sublimate.evaluation.audit import ATTACKS, make_attacks, make_case
from sublimate.evaluation.detectors import open_detector
from sublimate.evaluation.drawing import Generate, drawing
from sublimate.evaluation.erasure import run
from sublimate.evaluation.erasure_result import ErasureResult
from sublimate.evaluation.hardware import hardware_line
from sublimate.evaluation.ink_demo import ink_eraser, ink_request
from sublimate.evaluation.ink_study import ink_study
from sublimate.evaluation.intervals import plain
from sublimate.evaluation.studies import ErasureStudy, PromptSet
from sublimate.pipelines.edit import Edit, open_edited
from sublimate.pipelines.model import Model, open_model
from sublimate.training import registry
from sublimate.training.config import load_config
from sublimate.training.distill import DistillConfig, distill
from sublimate.training.ink.captions import prompts
from sublimate.training.ink.vocabulary import GROUPS, SYNONYMS, locate
from sublimate.training.randomness import key

HERE = Path(__file__).parent
RESULTS, RUNS = HERE / "results" / "erasure", Path("runs/benchmark-erasure")

ERASERS = (
    "uce",
    "rece",
    "speed",
    "esd",
    "all_but_one",
    "concept_ablation",
    "salun",
    "few_shot",
    "slug",
    "adv_unlearn",
    "mace_fusion",
    "l1_sparse",
    "prune_then_erase",
    "receler",
    "interpret_then_deactivate",
)
CONCEPTS: Mapping[str, tuple[str, ...]] = {
    "digit": ("seven",),
    "ink": ("red",),
    "style": ("striped",),
    "five": ("seven", "three", "red", "purple", "striped"),
}
UNEDITED = "unedited"
"""No eraser: what a student learns of a teacher that knows the concept."""
SURVIVING = (
    UNEDITED,
    "uce",
    "esd",
    "concept_ablation",
    "few_shot",
    "receler",
    "interpret_then_deactivate",
)
STUDENTS: Mapping[str, tuple[str, ...]] = {
    # name: a run of configs/distill/ and changes to it; all take about as many network passes.
    "f_distill": ("demo",),
    "f_distill-left_out": ("demo", "data.prompts={without}"),
    "f_distill-swapped": ("demo", "forget={forget}"),
    "em_distillation": ("ink_em_distillation",),
    # Renderings of Ink show the concept: the images are the edited teacher's own.
    "consistency_distillation": ("ink_consistency_distillation", "data.images=teacher", "data.count=1024"),
}
PASSES = 200_000
"""What a student of the survival table is trained for, in network passes of one sample, the teacher's own included."""
ATTACKED = (UNEDITED, "uce", "rece", "speed", "esd", "concept_ablation", "receler", "adv_unlearn")
STEPS = 10
"""Sampling steps of the eraser table's pictures, two fifths of the cost of the 25 that audits draw with."""
TARGETS, ATTEMPTS = 500, 100
"""Prompts for an erased concept (half as many in other words, as many for its siblings), for attacks to start from."""
CONTENDERS, CONTENDERS_SIBLINGS = ("uce", "speed", "few_shot", "slug"), 2000
"""Whose siblings are asked for more often: the best must be shown to lose at most two points of them."""


def attacks() -> list[str]:
    """Those that one cell can hold; what distillation brings back, the survival cells say."""
    return [name for name in registry.available(ATTACKS) if name != "distillation"]


def study_of(concept: str, erased: Sequence[str], siblings: int = TARGETS) -> ErasureStudy:
    """What to ask about one of the erased concepts, which share the prompts; none asks for another of them."""
    whole, share = ink_study(concept, n=2 * CONTENDERS_SIBLINGS), len(erased)
    others = {(group, GROUPS[group][index]) for group, index in map(locate, erased)}
    others.remove((whole.group, whole.concept))

    def without(prompts: PromptSet, size: int) -> PromptSet:
        kept = [i for i, asked in enumerate(prompts.expected) if not others & set(asked.items())][:size]
        return PromptSet(tuple(prompts.texts[i] for i in kept), tuple(prompts.expected[i] for i in kept))

    return replace(
        whole,
        target=without(whole.target, TARGETS // share),
        synonyms=without(whole.synonyms, TARGETS // 2 // share),
        siblings=without(whole.siblings, siblings // share),
        unrelated=without(whole.unrelated, TARGETS // share),
    )


def erased(method: str, concepts: Sequence[str]) -> tuple[Model, Edit, dict[str, Any]]:
    """Ink's teacher after an eraser, its edit, and what that cost."""
    model, eraser = open_model("ink"), ink_eraser(method, concepts=concepts)
    began = time.perf_counter()
    with counting(model) as passes:
        edit = eraser.fit(model, ink_request(*concepts))
    cost = {"seconds": round(time.perf_counter() - began, 1), "passes": passes.count}
    with tempfile.TemporaryDirectory() as folder:
        size = edit.save(Path(folder) / "edit.safetensors").stat().st_size
    touched = sum(shape.numel() for shape in edit.shapes().values())
    edit.apply(model)
    return model, edit, {**cost, "megabytes": round(size / 1e6, 2), "weights": touched}


def rates_of(result: ErasureResult) -> dict[str, Any]:
    """A study's rates as JSON values."""
    drift = result.drift
    return {
        **{name: pair.to_dict() for name, pair in result.rates.items()},
        "drift": None if drift is None else {"pixels": drift.pixels, "apart": drift.pixels_apart, "n": drift.n},
    }


def erase_cell(method: str, concepts: Sequence[str], before: Generate) -> dict[str, Any]:
    """One eraser on one row's concepts."""
    model, _, cost = erased(method, concepts)
    detector = open_detector("ink")
    siblings = CONTENDERS_SIBLINGS if method in CONTENDERS and len(concepts) == 1 else TARGETS
    found = {
        concept: rates_of(
            run(study_of(concept, concepts, siblings), before, drawing(model, steps=STEPS), detector, examples=0)
        )
        for concept in concepts
    }
    return {"concepts": found, **cost}


def attack_cell(method: str, name: str) -> dict[str, Any]:
    """One of an audit's attacks on one eraser's model, or on the unedited one, from the same prompts and noise."""
    base, (concept,) = open_model("ink"), CONCEPTS["digit"]
    model = base if method == UNEDITED else fitted_once(method, (concept,))
    aim, study = ink_request(concept).erase[0], ink_study(concept, n=ATTEMPTS)
    case = make_case(base, aim, study, open_detector("ink"), pictures=32, seed=0)
    (attack,) = make_attacks([name])
    if reason := attack.out_of_place(model, case):
        return {"not tried": reason}
    began = time.perf_counter()
    with counting(model) as passes:
        outcome = attack.run(model, case, seed=key(0, "attack", name))
    return {
        "box": attack.box,
        "budget": attack.budget,
        "rate": plain(outcome.rate),
        "curve": [{"steps": steps, **plain(rate)} for steps, rate in outcome.curve],
        "found": outcome.found,
        "passes": passes.count,
        "seconds": round(time.perf_counter() - began, 1),
    }


def fitted_once(method: str, concepts: Sequence[str]) -> Model:
    """Ink's teacher after an eraser, whose edit is kept for other cells."""
    base = open_model("ink")
    options = ink_eraser(method, concepts=concepts).config.model_dump_json()
    known = hashlib.sha256(f"{base.content_hash()} {options} {concepts}".encode()).hexdigest()[:16]
    path = RUNS / f"edit-{method}-{known}.safetensors"
    if not path.is_file():
        RUNS.mkdir(parents=True, exist_ok=True)
        erased(method, concepts)[1].save(path)
    return open_edited("ink", [path])


def survival_cell(method: str, student: str, before: Generate, folder: Path) -> dict[str, Any]:
    """The concept's rate in a student distilled from an eraser's teacher.

    The student starts as the edited teacher's network and reads the edited text encoder: of uce, esd and
    concept_ablation that is the base's, few_shot moved it. What receler attaches to the network and
    interpret_then_deactivate to the text encoder stays with the teacher: their students start as the base's network,
    read the base's text encoder, and learn what the attachment makes of the prompt.

    "left_out" leaves the concept's prompts out of the distillation; "swapped" has the teacher, and its images, answer
    them as if the anchor stood there, at a tenth more passes than are counted.
    """
    (concept,) = CONCEPTS["digit"]
    model = open_model("ink") if method == UNEDITED else fitted_once(method, CONCEPTS["digit"])
    name, *changes = STUDENTS[student]
    folder.mkdir(parents=True, exist_ok=True)
    words = SYNONYMS[concept]
    kept = [caption.text for caption in prompts(4096, 5) if not set(words) & set(re.findall(r"\w+", caption.text))]
    (folder / "without.txt").write_text("\n".join(kept) + "\n")
    aim = ink_request(concept).erase[0]
    forget = json.dumps([{"concept": aim.name, "anchor": aim.anchor, "synonyms": aim.synonyms}])
    changes = [change.format(without=folder / "without.txt", forget=forget) for change in changes]
    config = load_config(DistillConfig, name, [*changes, f"trainer.output_dir={folder / 'run'}"])
    config, passes = within_budget(config, PASSES)
    began = time.perf_counter()
    trained = open_model(str(distill(config, model)))
    seconds = round(time.perf_counter() - began, 1)
    study = replace(ink_study(concept, n=TARGETS), synonyms=PromptSet(), unrelated=PromptSet())
    result = run(study, before, drawing(trained), open_detector("ink"), examples=0)
    updates = config.trainer.max_train_steps
    return {"rates": rates_of(result), "seconds": seconds, "updates": updates, "passes": passes}


def kept(draw: Generate, folder: Path) -> Generate:
    """Draws the same prompts and seed only once, for this process and later ones: every cell asks the same base."""

    def drawn(texts: Sequence[str], seed: int) -> Tensor:
        path = folder / f"{hashlib.sha256(json.dumps([list(texts), seed]).encode()).hexdigest()[:16]}.safetensors"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"images": draw(texts, seed).contiguous()}, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        return load_file(path)["images"]

    return drawn


def cells(before: Generate) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every cell by its name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for method in ERASERS:
        for row, concepts in CONCEPTS.items():
            found[f"{method}-{row}"] = partial(erase_cell, method, concepts, before)
    for method in ATTACKED:
        for name in attacks():
            found[f"attack-{method}-{name}"] = partial(attack_cell, method, name)
    for method in SURVIVING:
        for student in STUDENTS:
            name = f"survival-{method}-{student}"
            found[name] = partial(survival_cell, method, student, before, RUNS / name)
    return found


COLUMNS = {
    "target": "drawn when asked",
    "synonyms": "in other forms",
    "siblings": "siblings obeyed",
    "untouched": "rest of its prompts obeyed",
    "unrelated": "unrelated obeyed",
    "rejected": "none of the labels",
}


def table() -> str:
    """The tables of the cells that are there, as Markdown; rates with 95 % intervals after the erasure."""
    head = ("eraser", "concept", *COLUMNS.values(), "s", "passes", "MB", "weights")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in ERASERS:
        for row in CONCEPTS:
            path = RESULTS / f"{method}-{row}.json"
            if not path.is_file():
                continue
            cell = json.loads(path.read_text())
            for concept, rates in cell["concepts"].items():
                numbers = [_moved(rates[name]) if name in rates else "" for name in COLUMNS]
                cost = (cell["seconds"], cell["passes"], cell["megabytes"], cell["weights"])
                what = concept if len(cell["concepts"]) == 1 else f"{concept} (of five)"
                lines.append("| " + " | ".join(map(str, (method, what, *numbers, *cost))) + " |")
    lines += ["", *_attack_table(), "", *_survival_table()]
    return "\n".join(lines)


def _attack_table() -> list[str]:
    cells = {(m, name): RESULTS / f"attack-{m}-{name}.json" for m in ATTACKED for name in attacks()}
    there = {place: json.loads(path.read_text()) for place, path in cells.items() if path.is_file()}
    if not there:
        return []
    methods = [method for method in ATTACKED if any(attacked == method for attacked, _ in there)]
    lines = ["| attack | budget | " + " | ".join(methods) + " |", "|---" * (2 + len(methods)) + "|"]
    for name in attacks():
        row = {method: there[method, name] for method in methods if (method, name) in there}
        if not row:
            continue
        budget = next((cell["budget"] for cell in row.values() if "budget" in cell), "")
        rates = [_interval(row[m]["rate"]) if "rate" in row.get(m, {}) else "" for m in methods]
        lines.append("| " + " | ".join((name, budget, *rates)) + " |")
    return lines


def _survival_table() -> list[str]:
    cells = {(m, s): RESULTS / f"survival-{m}-{s}.json" for m in SURVIVING for s in STUDENTS}
    there = {place: json.loads(path.read_text()) for place, path in cells.items() if path.is_file()}
    if not there:
        return []
    lines = ["| distilled from | " + " | ".join(STUDENTS) + " |", "|---" * (1 + len(STUDENTS)) + "|"]
    for method in SURVIVING:
        rates = [there.get((method, student)) for student in STUDENTS]
        row = ["" if cell is None else _interval(cell["rates"]["target"]["after"]) for cell in rates]
        lines.append("| " + " | ".join((method, *row)) + " |")
    return lines


def _moved(pair: Mapping[str, Any]) -> str:
    return f"{100 * pair['before']['value']:.1f} -> {_interval(pair['after'])}"


def _interval(rate: Mapping[str, float]) -> str:
    return f"{100 * rate['value']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def main() -> None:
    """Runs the cells that are missing, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run cells whose name contains this")
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    options = parser.parse_args()
    if not options.table:
        RESULTS.mkdir(parents=True, exist_ok=True)
        base = open_model("ink")
        before = kept(drawing(base, steps=STEPS), RUNS / f"base-{base.content_hash()[:8]}-{STEPS}")
        for name, work in cells(before).items():
            path = RESULTS / f"{name}.json"
            if path.exists() or options.only not in name:
                continue
            print(f"{name} ...", flush=True)
            found = work()
            record = {"cell": name, **found, "hardware": hardware_line()}
            path.write_text(json.dumps(record, indent=1) + "\n")
    print(table())


if __name__ == "__main__":
    main()
