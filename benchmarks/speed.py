"""Times a one-step student against the 25-step guided teacher, end to end in stock diffusers, in one run.

    python benchmarks/speed.py runs/demo/distill/student

Writes `results/speed.json`; only the ratio means anything on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from sublimate.evaluation.hardware import hardware_line

RESULTS = Path(__file__).parent / "results"
PROMPT = "a neon seven in red"


def seconds(pipeline: Any, batch: int, repeats: int, **call: Any) -> list[float]:
    """Wall-clock seconds of whole calls, text encoder and autoencoder included."""
    pipeline.set_progress_bar_config(disable=True)
    found = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        pipeline([PROMPT] * batch, generator=torch.Generator().manual_seed(0), **call)
        found.append(time.perf_counter() - began)
    return found[1:]


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with as_file(files("sublimate.assets") / "ink") as folder:
        teacher = DiffusionPipeline.from_pretrained(folder)
    student = DiffusionPipeline.from_pretrained(options.student)
    record: dict[str, Any] = {"batch": options.batch, "repeats": options.repeats, "prompt": PROMPT}
    for name, pipeline, call in (
        ("teacher", teacher, {"num_inference_steps": 25, "guidance_scale": 3.0}),
        ("student", student, {"num_inference_steps": 1, "guidance_scale": 1.0}),
    ):
        found = seconds(pipeline, options.batch, options.repeats, **call)
        record[name] = {"median_seconds": statistics.median(found), "seconds": found, **call}
    record["ratio"] = record["teacher"]["median_seconds"] / record["student"]["median_seconds"]
    record["network_forwards_ratio"] = 2 * 25
    record["hardware"] = hardware_line()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "speed.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
