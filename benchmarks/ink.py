"""Trains every objective from Ink's teacher with one budget of network passes, and measures all students alike.

A resumable queue: every cell runs in a process of its own, writes one JSON file and one row of pictures under
`results/ink/` and is skipped when that exists; an interrupted training goes on from its checkpoint.

    python benchmarks/ink.py                    # all cells that are missing
    python benchmarks/ink.py --only f_distill   # cells whose name contains this
    python benchmarks/ink.py --table            # the table of what is there
    python benchmarks/ink.py --picture          # docs/ink_methods.png: the row of every cell that is there
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sublimate.evaluation.hardware import hardware_line
from sublimate.evaluation.ink_study import ink_quality
from sublimate.pipelines.discriminator_guidance import DiscriminatorGuidance
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.pipelines.pictures import image_grid, to_png
from sublimate.pipelines.speedupnet import NAME as SPEEDUPNET
from sublimate.pipelines.speedupnet import attach_speedupnet
from sublimate.training import registry
from sublimate.training.checkpoints import find_checkpoint
from sublimate.training.config import load_config, validate_section
from sublimate.training.distill import OBJECTIVES, DistillConfig, distill
from sublimate.training.ink.captions import prompts
from sublimate.training.objective import Objective

HERE = Path(__file__).parent
RESULTS, RUNS, PICTURE = HERE / "results" / "ink", Path("runs/benchmark-ink"), Path("docs/ink_methods.png")
BUDGET = 300_000
"""Network passes of one sample that a cell may train for."""
LONG_BUDGET = 1_600_000
"""... that the longer runs may."""

Draw = Callable[[Sequence[str], int], Tensor]


@dataclass(frozen=True)
class Cell:
    """One row: a packaged configuration, changes to it, and how many steps its student is drawn in.

    Attributes:
        config: of `configs/distill/`; None measures the teacher.
        overrides: changes to it.
        steps: sampling steps of the measurement.
        budget: passes to train for.
        sampler: of the teacher, unguided; None is its own, guided.
    """

    config: str | None
    overrides: tuple[str, ...] = ()
    steps: int = 1
    budget: int = BUDGET
    sampler: str | None = None


def _seeds(name: str, cell: Cell, seeds: Sequence[int]) -> dict[str, Cell]:
    return {f"{name}-{seed}": replace(cell, overrides=(*cell.overrides, f"trainer.seed={seed}")) for seed in seeds}


CELLS: dict[str, Cell] = {
    "teacher": Cell(None, steps=25),
    # What few steps make of the undistilled teacher: by the sampler of few-step students, whose passes it takes, and
    # by its own, which takes two passes for each step.
    "teacher-in-4": Cell(None, steps=4, sampler="consistency"),
    "teacher-in-4-guided": Cell(None, steps=4),
    # In float32, as all the others.
    **_seeds("f_distill", Cell("ink_f_distill", ("trainer.mixed_precision=no", "attention=null")), (0, 1)),
    **_seeds(
        "f_distill-in-4",
        Cell("ink_f_distill", ("trainer.mixed_precision=no", "attention=null", "objective.sampling_steps=4"), steps=4),
        (0,),
    ),
    **_seeds("em_distillation", Cell("ink_em_distillation"), (0, 1)),
    **_seeds("uni_instruct", Cell("ink_uni_instruct"), (0, 1)),
    **_seeds("consistency_distillation", Cell("ink_consistency_distillation", steps=4), (0, 1)),
    **_seeds("target_driven", Cell("ink_target_driven", steps=4), (0, 1)),
    **_seeds("score_identity", Cell("ink_score_identity"), (0,)),
    **_seeds("swiftbrush", Cell("ink_swiftbrush"), (0,)),
    **_seeds("disback", Cell("ink_disback"), (0,)),
    **_seeds("flash", Cell("ink_flash", steps=4), (0,)),
    # Its discretisation is finest when the budget is spent.
    **_seeds(
        "consistency_training", Cell("ink_consistency_training", ("objective.pairs.total_steps=1171",), steps=4), (0,)
    ),
    **_seeds("consistency_tuning", Cell("ink_consistency_tuning", steps=4), (0,)),
    # The same on the teacher's own guided pictures, which pay for what they teach of the prompts.
    **_seeds(
        "consistency_tuning-guided",
        Cell(
            "ink_consistency_tuning",
            ("data.images=teacher", "data.count=2048", "data.teacher_steps=12", "data.teacher_guidance_scale=2"),
            steps=4,
        ),
        (0,),
    ),
    **_seeds("consistency_trajectory", Cell("ink_consistency_trajectory", steps=4), (0,)),
    **_seeds("speedupnet", Cell("ink_speedupnet", steps=4), (0,)),
    **_seeds("discriminator_guidance", Cell("ink_discriminator_guidance", steps=25), (0,)),
    # The longer runs: the best one-step student against the teacher, Jensen-Shannon beside reverse KL.
    **_seeds("long-jensen_shannon", Cell("ink_f_distill", budget=LONG_BUDGET), (0, 1, 2)),
    **_seeds(
        "long-reverse_kl", Cell("ink_f_distill", ("objective.divergence=reverse_kl",), budget=LONG_BUDGET), (0, 1, 2)
    ),
}


def within_budget(config: DistillConfig, budget: int) -> tuple[DistillConfig, int]:
    """The run with as many steps as a budget of passes allows, and the passes that it costs.

    What the teacher draws for the run's data is part of them.
    """
    method = registry.load(OBJECTIVES, config.method, Objective)
    options = validate_section(method.Config, config.objective)
    batch = config.trainer.train_batch_size * config.trainer.gradient_accumulation_steps
    needs = method(open_model(config.model), options).needs
    draws = ("samples" in needs) + ("images" in needs and config.data.images == "teacher")
    guided = 1 if (config.data.teacher_guidance_scale or options.sample_guidance) == 1 else 2
    steps, spent = 0, float(draws * config.data.count * config.data.teacher_steps * guided)
    while spent + batch * options.passes(steps) <= budget:
        spent, steps = spent + batch * options.passes(steps), steps + 1
    if not steps:
        raise ValueError(f"{budget:,} passes pay for no step of {config.method}: its data alone take {spent:,.0f}.")
    trainer = config.trainer.model_copy(update={"max_train_steps": steps})
    return config.model_copy(update={"trainer": trainer}), round(spent)


def drawing(name: str, cell: Cell) -> Draw:
    """How a trained cell draws: its exported student, or the teacher with what was trained beside it."""
    if cell.config is None:
        model = open_model("ink")
        scale = None if cell.sampler is None else 1.0
        return lambda texts, seed: generate(
            model, texts, seed=seed, steps=cell.steps, sampler=cell.sampler, guidance_scale=scale
        )
    folder = RUNS / name / "student"
    if (folder / "model_index.json").is_file():
        student = open_model(str(folder))
        if (cell.steps > 1) != ("few_steps" in student.defaults):
            raise ValueError(f"{name} was not trained to be drawn in {cell.steps} steps: set its sampling_steps.")
        return lambda texts, seed: generate(student, texts, seed=seed, steps=cell.steps)
    model = open_model("ink")
    if json.loads((folder / "sublimate.json").read_text())["name"] == SPEEDUPNET:
        attach_speedupnet(model, folder)
        return lambda texts, seed: generate(model, texts, seed=seed, steps=cell.steps)
    guidance = DiscriminatorGuidance.load(model, folder)
    return lambda texts, seed: generate(model, texts, seed=seed, steps=cell.steps, discriminator=guidance)


def run_cell(name: str, n: int) -> None:
    """Trains and measures one cell in this process, and writes its JSON file."""
    cell = CELLS[name]
    path = RESULTS / f"{name}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    record: dict[str, Any] = {"cell": name, "steps": cell.steps}
    untrained = False
    if cell.config is not None:
        changes = [f"trainer.output_dir={RUNS / name}", *cell.overrides]
        config, passes = within_budget(load_config(DistillConfig, cell.config, changes), cell.budget)
        updates = config.trainer.max_train_steps
        found = find_checkpoint(config.trainer.output_dir, "latest")
        resumed = 0 if found is None else json.loads((found / "state.json").read_text())["step"]
        began = time.perf_counter()
        distill(config)
        seconds = time.perf_counter() - began
        record |= {"method": config.method, "config": cell.config, "overrides": cell.overrides, "passes": passes}
        untrained = updates == resumed
        per_update = earlier.get("seconds_per_update") if untrained else round(seconds / (updates - resumed), 3)
        record |= {"updates": updates, "seconds_per_update": per_update}
    # Where an earlier process trained, its figures are the cell's.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    memory = earlier.get("peak_memory_gib", peak) if untrained else peak
    draw = drawing(name, cell)
    quality = ink_quality(draw, n=n, judged=min(2000, n))
    record |= {"peak_memory_gib": round(memory, 2), "n": n, **quality.to_dict(), "hardware": hardware_line()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    # The same sixteen prompts from the same noise for every cell.
    row = draw([caption.text for caption in prompts(16, 7)], 7)
    (RESULTS / f"{name}.png").write_bytes(to_png(image_grid(row, columns=16)))
    path.write_text(json.dumps(record, indent=1) + "\n")


def table() -> str:
    """The cells that are there, as Markdown; accuracy is of everything a prompt asks for, with its 95 % interval."""
    head = ("", "steps", "Ink-FID", "precision", "recall", "prompt accuracy", "rejected", "updates", "s/update", "GiB")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in CELLS:
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            continue
        cell = json.loads(path.read_text())
        together, rejected = (cell["agreement"][key] for key in ("together", "rejected"))
        percent = [f"{100 * together[key]:.1f}" for key in ("value", "low", "high")]
        fidelity = cell["fidelity"]
        row = (
            name,
            cell["steps"],
            f"{fidelity['fid']:.2f}",
            f"{fidelity['precision']:.3f}",
            f"{fidelity['recall']:.3f}",
            f"{percent[0]} % [{percent[1]}, {percent[2]}]",
            f"{100 * rejected['value']:.1f} %",
            cell.get("updates", ""),
            cell.get("seconds_per_update") or "",
            cell["peak_memory_gib"],
        )
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def picture() -> None:
    """The rows of the measured cells, one under the other."""
    done = [name for name in CELLS if (RESULTS / f"{name}.png").is_file()]
    if not done:
        raise SystemExit(f"No cell has drawn its row under {RESULTS} yet: run this script first.")
    rows = [np.asarray(Image.open(RESULTS / f"{name}.png")) for name in done]
    PICTURE.parent.mkdir(exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(PICTURE)
    print(f"Wrote {PICTURE}: from the top {', '.join(done)}")


def main() -> None:
    """Runs the cells that are missing, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run cells whose name contains this")
    parser.add_argument("--n", type=int, default=5000, help="images per measurement")
    parser.add_argument("--cell", choices=CELLS, help="run this cell in this process")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    parser.add_argument("--picture", action="store_true", help="draw the picture and stop")
    options = parser.parse_args()
    if options.cell:
        run_cell(options.cell, options.n)
        return
    if options.picture:
        picture()
    elif not options.table:
        for name in CELLS:
            path = RESULTS / f"{name}.json"
            if options.only in name and not (path.exists() and json.loads(path.read_text())["n"] == options.n):
                print(f"{name} ...", flush=True)
                command = [sys.executable, __file__, "--cell", name, "--n", str(options.n)]
                subprocess.run(command, check=True)
    print(table())


if __name__ == "__main__":
    main()
