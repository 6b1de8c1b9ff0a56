"""Kills a distillation at random points and checks that the resumed run ends at the same weights, bit for bit.

    python benchmarks/interruptions.py --times 20      # so many SIGTERMs and so many SIGKILLs

One process, CPU. Writes `results/interruptions.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from sublimate.evaluation.hardware import hardware_line

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/interruptions")
STEPS = 12
OPTIONS = (
    f"trainer.max_train_steps={STEPS}",
    "trainer.train_batch_size=2",
    "trainer.checkpointing_steps=2",
    "objective.critic_updates=1",
    "data.count=4",
    "data.teacher_steps=2",
)


def command(folder: Path) -> list[str]:
    """The run whose interruption is tested."""
    return [sys.executable, "-m", "sublimate.cli", "distill", "demo", f"trainer.output_dir={folder}", *OPTIONS]


def finish(folder: Path) -> str:
    """Runs to the end and returns the hash of the student's weights."""
    subprocess.run(command(folder), check=True, capture_output=True)
    weights = folder / "student" / "unet" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def steps_done(folder: Path) -> int:
    """The newest complete checkpoint's step."""
    found = [int(p.name.removeprefix("checkpoint-")) for p in folder.glob("checkpoint-*")]
    return max(found, default=0)


def interrupt(folder: Path, number: int, delay: float) -> tuple[int, int]:
    """Starts the run, stops it after `delay` seconds; returns its exit status and the steps that survived."""
    process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(delay)
    process.send_signal(number)
    return process.wait(timeout=300), steps_done(folder)


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    shutil.rmtree(RUNS, ignore_errors=True)
    began = time.perf_counter()
    expected = finish(RUNS / "straight")
    whole = time.perf_counter() - began
    outcomes = []
    for number in (signal.SIGTERM, signal.SIGKILL):
        for index in range(options.times):
            folder = RUNS / f"{number.name}-{index}"
            status, survived = interrupt(folder, number, rng.uniform(0.3, 1.0) * whole)
            same = finish(folder) == expected
            outcomes.append({"signal": number.name, "status": status, "survived_steps": survived, "same_bits": same})
            print(outcomes[-1], flush=True)
            shutil.rmtree(folder)
    record = {"steps": STEPS, "seed": options.seed, "runs": outcomes, "hardware": hardware_line()}
    record["all_same"] = all(outcome["same_bits"] for outcome in outcomes)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "interruptions.json").write_text(json.dumps(record, indent=1) + "\n")
    print("all equal" if record["all_same"] else "DIFFERENCES")


if __name__ == "__main__":
    main()
