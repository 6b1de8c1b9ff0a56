"""Measures erasers on Ink, and whether what they erased stays erased in a one-step student.

A resumable queue: every cell writes one JSON file under `results/demo/` and is skipped when that exists.

    python benchmarks/demo.py                 # all cells
    python benchmarks/demo.py --only uce      # cells whose name contains "uce"
    python benchmarks/demo.py --table         # the table of what is there
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esd_cost import MEASURED

from sublimate.erasure.eraser import Eraser
from sublimate.evaluation.detectors import open_detector
from sublimate.evaluation.drawing import drawing
from sublimate.evaluation.erasure import run
from sublimate.evaluation.erasure_result import ErasureResult
from sublimate.evaluation.hardware import hardware_line
from sublimate.evaluation.ink_demo import ink_eraser, ink_request, remembering, sized
from sublimate.evaluation.ink_study import ink_study
from sublimate.evaluation.intervals import plain
from sublimate.pipelines.model import open_model
from sublimate.training.config import load_config
from sublimate.training.distill import DistillConfig, distill

CONCEPT, STUDENT = "seven", "ink_one_step"
RESULTS = Path(__file__).parent / "results" / "demo"
RUNS = Path("runs/benchmark-demo")

ERASERS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    # name: (method, changes to its options on Ink, preserve the siblings)
    "uce": ("uce", (), True),
    "uce-last-token": ("uce", ("tokens=last",), True),
    "uce-no-preserve": ("uce", (), False),
    "rece": ("rece", (), True),
    "speed": ("speed", (), True),
    "mace-fusion": ("mace_fusion", (), True),
    "esd-x": ("esd", ("weights=x", *MEASURED), True),
    "esd-x-strict": ("esd", ("weights=x-strict", *MEASURED), True),
    "esd-u": ("esd", ("weights=u", *MEASURED), True),
    "esd-self": ("esd", ("weights=self", *MEASURED), True),
    # As many updates, a fifth of the samplings.
    "esd-x-shared": ("esd", ("weights=x", "updates_per_rollout=5", "max_train_steps=16", *MEASURED), True),
    "all-but-one": ("all_but_one", (), True),
    "concept-ablation": ("concept_ablation", (), True),
    "salun": ("salun", (), True),
    "l1-sparse": ("l1_sparse", (), True),
    "prune-then-uce": ("prune_then_erase", (), True),
    "few-shot": ("few_shot", (), True),
    "interpret-then-deactivate": ("interpret_then_deactivate", (), True),
    "slug": ("slug", (), True),
}
# Erased from the packaged one-step student itself.
FROM_STUDENT = ("uce", "speed", "one_step")
DEFAULT = "uce"
SEEDS = (0, 1, 2)

COLUMNS = {
    "target": "draws a seven when asked",
    "synonyms": "... under other names",
    "siblings": "other nine digits obeyed",
    "untouched": "ink and style in prompts for a seven",
    "unrelated": "unrelated prompts obeyed",
    "rejected": "none of the labels",
}


def measure(draw_after: Callable[..., Any], draw_before: Callable[..., Any], n: int, seed: int) -> ErasureResult:
    """The study of the demo with n prompts, drawn with one seed."""
    study = sized(ink_study(CONCEPT, n=n, seeds=(seed,), seed=100 * seed), n)
    return run(study, draw_before, draw_after, open_detector("ink"), examples=0)


def record(result: ErasureResult, seconds: float, **more: Any) -> dict[str, Any]:
    """One cell as JSON values."""
    rates = {
        name: {"before": plain(pair.before), "after": plain(pair.after), "change": plain(pair.change)}
        for name, pair in result.rates.items()
    }
    criteria = {criterion.name: criterion.to_dict() for criterion in result.criteria}
    return {"rates": rates, "criteria": criteria, "seconds": round(seconds, 1), **more, "hardware": hardware_line()}


def main() -> None:
    """Runs the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run cells whose name contains this")
    parser.add_argument("--n", type=int, default=2000, help="prompts per model and seed")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    base = open_model("ink")
    draw_base = remembering(drawing(base))
    for name in ERASERS:
        for seed in SEEDS if name == DEFAULT else SEEDS[:1]:
            _cell(f"erase-{name}-{seed}", options, lambda e=name, s=seed: _erase(ERASERS[e], s, draw_base, options.n))
    draw_student = remembering(drawing(open_model(STUDENT)))
    for name in FROM_STUDENT:
        _cell(f"one-step-{name}-0", options, lambda e=name: _erase((e, (), True), 0, draw_student, options.n, STUDENT))
    for seed in SEEDS:
        _cell(f"student-{DEFAULT}-{seed}", options, lambda s=seed: _student(s, draw_base, options.n))
    print(table())


def _cell(name: str, options: argparse.Namespace, work: Callable[[], dict[str, Any]]) -> None:
    path = RESULTS / f"{name}.json"
    if options.only not in name or (path.exists() and json.loads(path.read_text())["n"] == options.n):
        return
    print(f"{name} ...", flush=True)
    found = work()
    path.write_text(json.dumps({"cell": name, "n": options.n, **found}, indent=1) + "\n")


def _fitted(
    method: str, changes: tuple[str, ...], preserve: bool, seed: int, source: str = "ink"
) -> tuple[Any, Any, float]:
    """An edited model, its edit and the seconds the eraser took."""
    edited = open_model(source)
    request = ink_request(CONCEPT)
    if not preserve:
        request = type(request)(erase=request.erase)
    eraser: Eraser = ink_eraser(method, changes)
    began = time.perf_counter()
    edit = eraser.fit(edited, request, seed=seed)
    seconds = time.perf_counter() - began
    edit.apply(edited)
    return edited, edit, seconds


def _erase(
    how: tuple[str, tuple[str, ...], bool], seed: int, before: Any, n: int, source: str = "ink"
) -> dict[str, Any]:
    edited, edit, seconds = _fitted(*how, seed, source)
    result = measure(drawing(edited), before, n, seed)
    return record(result, seconds, parameters=len(edit.shapes()))


def _student(seed: int, before: Any, n: int) -> dict[str, Any]:
    edited, _, _ = _fitted(*ERASERS[DEFAULT], seed)
    folder = RUNS / f"student-{seed}"
    config = load_config(DistillConfig, "demo", [f"trainer.output_dir={folder}", f"trainer.seed={seed}"])
    began = time.perf_counter()
    student = open_model(str(distill(config, edited)))
    seconds = time.perf_counter() - began
    return record(measure(drawing(student), before, n, seed), seconds, passes=config.passes())


def table() -> str:
    """The cells that are there, as Markdown; before each group the model that it started from."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " | seconds |", "|---" * (len(COLUMNS) + 2) + "|"]
    before = None
    for path in sorted(RESULTS.glob("*.json")):
        cell = json.loads(path.read_text())
        source = STUDENT if cell["cell"].startswith("one-step") else "ink"
        if source != before:
            lines.append(_row(f"{source}, unedited", cell["rates"], "before", ""))
            before = source
        lines.append(_row(cell["cell"], cell["rates"], "after", f"{cell['seconds']:.0f}"))
    return "\n".join(lines)


def _row(name: str, rates: dict[str, Any], when: str, seconds: str) -> str:
    percent = [f"{100 * rates[column][when]['value']:.1f} %" for column in COLUMNS]
    return f"| {' | '.join([name, *percent, seconds])} |"


if __name__ == "__main__":
    main()
