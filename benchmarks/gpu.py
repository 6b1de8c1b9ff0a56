"""Times generation, student updates and erasure at the published checkpoints' sizes, on one GPU, with random weights.

Every cell runs in a process of its own and writes one JSON file under `results/gpu/`; it is skipped when that exists.

    python benchmarks/gpu.py                                # all cells
    python benchmarks/gpu.py --only sdxl                    # cells whose name contains this
    python benchmarks/gpu.py --only ink --device cpu        # what a machine without GPU can try
    python benchmarks/gpu.py --table

Operations are counted on shapes (`sublimate.training.plan`); the ceiling is what a large product of bf16 matrices
reaches on the same card in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from full_size import SIZES

from sublimate.diffusion.denoisers import Denoiser
from sublimate.erasure.methods.esd import ESD
from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
from sublimate.evaluation.hardware import hardware_line
from sublimate.pipelines.attention import Kernel, attention_chosen
from sublimate.pipelines.generate import generate
from sublimate.pipelines.memory_format import channels_last
from sublimate.pipelines.model import Model, open_model
from sublimate.pipelines.shapes import Shapes, open_shapes
from sublimate.training import registry
from sublimate.training.config import validate_section
from sublimate.training.data import ModelSource
from sublimate.training.distill import OBJECTIVES, DistillConfig
from sublimate.training.objective import Objective, Turn
from sublimate.training.plan import plan_distillation
from sublimate.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "gpu"
KERNELS: tuple[Kernel, ...] = ("sdpa", "flash", "efficient", "cudnn", "math", "xformers")
BATCHES: Mapping[str, int] = {"sd15": 16, "sdxl": 4, "pixart": 16, "ink": 4}
OTHER_BATCHES = (4, 8, 32, 64)
"""Of Stable Diffusion 1.5's updates, where the best one is looked for."""
UPDATES = 3
"""Timed updates of a run, after one that warms up."""


def opened(size: str, device: torch.device) -> Model:
    """A model with random weights on a device; Ink is the one that is small and real."""
    if size == "ink":
        return open_model("ink", device=device)
    torch.manual_seed(0)
    return SIZES[size](device)


def shapes(size: str) -> Model:
    """The same without storage."""
    return open_shapes("ink") if size == "ink" else SIZES[size](Shapes())


def seconds(work: Callable[[], Any], device: torch.device, repeats: int = UPDATES) -> list[float]:
    """Wall-clock seconds of a call, again and again after one that warms up."""
    found = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        found.append(round(time.perf_counter() - began, 4))
    return found[1:]


def ceiling(device: torch.device) -> float:
    """FLOP/s of a product of bf16 matrices."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in "ab")
    return 2 * n**3 / min(seconds(lambda: a @ b, device, repeats=20))


def generation(size: str, device: torch.device) -> dict[str, Any]:
    """One unguided step against 25 guided ones, text encoders and autoencoder included, in bf16."""
    model = opened(size, device).to(dtype=torch.bfloat16)
    prompts = ["a"] * BATCHES[size]
    one = seconds(lambda: generate(model, prompts, steps=1, guidance_scale=1.0, progress=False), device)
    many = seconds(lambda: generate(model, prompts, steps=25, guidance_scale=5.0, progress=False), device)
    ratio = statistics.median(many) / statistics.median(one)
    return {"batch": len(prompts), "one_step": one, "25_steps": many, "ratio": round(ratio, 2)}


def update(
    size: str,
    kind: str,
    device: torch.device,
    *,
    kernel: Kernel = "sdpa",
    compiled: bool = False,
    last: bool = False,
    batch: int | None = None,
) -> dict[str, Any]:
    """A training step of f-distill, one critic's turn and one student's, and the student's alone; bf16 autocast."""
    player, batch = {"kind": kind}, batch or BATCHES[size]
    with tempfile.TemporaryDirectory() as folder:
        config = DistillConfig(
            model=size,
            attention=kernel,
            objective={"critic_updates": 1, "student": player, "critic": player},
            trainer={
                "output_dir": folder,
                "train_batch_size": batch,
                "mixed_precision": "bf16",
                "gradient_checkpointing": size != "ink",
            },
        )
        counted = plan_distillation(config, shapes(size))
        model = opened(size, device)
        method = registry.load(OBJECTIVES, config.method, Objective)
        with attention_chosen(model, kernel, autocast=True), channels_last(model) if last else nullcontext():
            objective = method(model, validate_section(method.Config, config.objective))
            source = ModelSource(model, ["a"], torch.zeros(1, *model.latent_shape))
            trainer = Trainer(objective, source, config.trainer, progress=False)
            if compiled:
                for made in trainer.players.values():
                    if isinstance(made.module, Denoiser):
                        made.module.network.compile()

            turns = trainer.objective.turns(trainer.step)

            def take(some: Sequence[Turn]) -> None:
                for turn in some:
                    trainer.accumulate(turn)
                    trainer.update(turn)

            step = seconds(lambda: take(turns), device)
            student = seconds(lambda: take([turn for turn in turns if turn.name == "student"]), device)
    most = ceiling(device)
    return {
        "batch": batch,
        "counted_peak_gib": round(counted.peak / 2**30, 2),
        "step": _speed(step, counted.flops, most),
        "student_update": _speed(student, counted.turns["student"].flops, most),
    }


def _speed(found: list[float], flops: int, most: float) -> dict[str, Any]:
    reached = flops / min(found)
    return {
        "seconds": found,
        "flops": flops,
        "flops_per_second": reached,
        "share_of_ceiling": round(reached / most, 4),
    }


def erasing(size: str, device: torch.device) -> dict[str, Any]:
    """ESD's seconds per update, with roll-outs of 50 steps that serve five each, and UCE's for one concept."""
    model, request = opened(size, device), Request((Concept("a", anchor="e"),), ("i",))
    shared = {"updates_per_rollout": 5, "mixed_precision": "bf16", "gradient_checkpointing": size != "ink"}
    plain = Request((Concept("a"),))

    def fitted(steps: int) -> float:
        return min(seconds(lambda: ESD(max_train_steps=steps, **shared).fit(model, plain), device))

    # What comes before and after the updates, such as the hash of the weights, is in both.
    per_update = (fitted(3) - fitted(1)) / 10
    return {"esd_per_update": round(per_update, 4), "uce": seconds(lambda: UCE().fit(model, request), device)}


def cells(device: torch.device) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every cell by its name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for size in BATCHES:
        found[f"{size}-generation"] = partial(generation, size, device)
        for kind in ("full", "lora"):
            made = partial(update, size, kind, device)
            for kernel in KERNELS if size == "sd15" else ("sdpa",):
                found[f"{size}-update-{kind}-{kernel}"] = partial(made, kernel=kernel)
            found[f"{size}-update-{kind}-compiled"] = partial(made, compiled=True)
            if size != "pixart":
                found[f"{size}-update-{kind}-channels_last"] = partial(made, last=True)
            for batch in OTHER_BATCHES if size == "sd15" else ():
                found[f"{size}-update-{kind}-batch{batch}"] = partial(made, batch=batch)
        if size != "pixart":
            found[f"{size}-erasing"] = partial(erasing, size, device)
    return found


def run_cell(name: str, device: torch.device) -> None:
    """Runs one cell in this process, and writes its JSON file; what cannot run here says why."""
    try:
        record = cells(device)[name]()
    except (ValueError, torch.OutOfMemoryError) as refusal:
        record = {"refused": str(refusal).splitlines()[0]}
    if device.type == "cuda":
        record["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {"cell": name, **record, "hardware": hardware_line()}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def table() -> str:
    """The cells that are there, as Markdown: updates of f-distill, then everything else."""
    head = (
        "cell",
        "batch",
        "s per step",
        "s per student update",
        "TFLOP/s of it",
        "of the ceiling",
        "peak GiB (counted)",
    )
    updates = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    others = ["", "| cell | measured |", "|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        cell = json.loads(path.read_text())
        if "student_update" not in cell:
            measured = {key: value for key, value in cell.items() if key not in ("cell", "hardware")}
            others.append(f"| {cell['cell']} | {', '.join(f'{key} {value}' for key, value in measured.items())} |")
            continue
        student = cell["student_update"]
        row = (
            cell["cell"],
            cell["batch"],
            min(cell["step"]["seconds"]),
            min(student["seconds"]),
            f"{student['flops_per_second'] / 1e12:.1f}",
            f"{100 * student['share_of_ceiling']:.1f} %",
            f"{cell.get('peak_gib', '')} ({cell['counted_peak_gib']})",
        )
        updates.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join([*updates, *others])


def main() -> None:
    """Runs the cells that are missing, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run cells whose name contains this; Ink's are run by name alone")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cell", help="run this cell in this process")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    options = parser.parse_args()
    device, failed = torch.device(options.device), []
    if options.cell:
        run_cell(options.cell, device)
        return
    for name in [] if options.table else cells(device):
        wanted = options.only in name and (not name.startswith("ink") or options.only.startswith("ink"))
        if wanted and not (RESULTS / f"{name}.json").exists():
            print(f"{name} ...", flush=True)
            command = [sys.executable, __file__, "--cell", name, "--device", options.device]
            if subprocess.run(command, check=False).returncode:
                failed.append(name)  # the others are worth their time all the same
    print(table())
    if failed:
        raise SystemExit(f"These cells failed: {', '.join(failed)}.")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
