"""Counts what the packaged recipes need at their checkpoints' real sizes, from shapes alone: no weights, no GPU.

    python benchmarks/plans.py                # the recipes that are missing in results/plans.json
    python benchmarks/plans.py --only sdxl    # those whose name contains this, again
    python benchmarks/plans.py --table        # what is there

Bytes are those of tensors in a run of one process in which attention is fused; a device's libraries come on top.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from full_size import SIZES

from sublimate.erasure.methods.esd import ESD, ESDConfig
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.model import Model
from sublimate.pipelines.shapes import Shapes, in_precision
from sublimate.training.config import load_config
from sublimate.training.distill import DistillConfig
from sublimate.training.plan import Plan, plan_distillation

RESULT = Path(__file__).parent / "results" / "plans.json"
# Micro-batches are all alike: of Stable Diffusion XL one takes long enough.
SHORT = ("trainer.gradient_accumulation_steps=1",)
FLOAT32 = ("dtype=float32",)
FULL = tuple(f"objective.{player}.kind=full" for player in ("student", "critic"))


def shapes(name: str, dtype: str) -> Model:
    """The model that a recipe's name begins with."""
    return in_precision(SIZES[name.partition("_")[0]](Shapes()), getattr(torch, dtype))


def distillation(name: str, *overrides: str) -> Plan:
    """A recipe of `configs/distill/`."""
    config = load_config(DistillConfig, name, list(overrides), kind="distill")
    return plan_distillation(config, shapes(name, config.dtype))


def erasure(name: str, dtype: str = "float32") -> Plan:
    """A recipe of ESD."""
    return ESD(load_config(ESDConfig, name, kind="erase")).plan(shapes(name, dtype), Request((Concept("a"),)))


CELLS: Mapping[str, Callable[[], Plan]] = {
    "sd15_f_distill": partial(distillation, "sd15_f_distill"),
    "sdxl_f_distill, a micro-batch of each turn": partial(distillation, "sdxl_f_distill", *SHORT),
    "sdxl_f_distill over a base in float32, the same": partial(distillation, "sdxl_f_distill", *SHORT, *FLOAT32),
    "sdxl_f_distill with full copies, the same": partial(distillation, "sdxl_f_distill", *SHORT, *FLOAT32, *FULL),
    "pixart_swiftbrush": partial(distillation, "pixart_swiftbrush"),
    "sdxl_style_esd over a base in bfloat16": partial(erasure, "sdxl_style_esd", "bfloat16"),
    **{name: partial(erasure, name) for name in ("sd15_style_esd", "sd15_object_esd", "sdxl_style_esd")},
}


def table(found: Mapping[str, Any]) -> str:
    """What is there, as Markdown."""
    lines = ["| recipe | shared weights | players | peak | TFLOP per step |", "|---" * 5 + "|"]
    for name, cell in found.items():
        own = sum(sum(player.values()) for player in cell["players"].values())
        flops = sum(turn["times"] * turn["flops"] for turn in cell["turns"].values())
        peak = max(turn["peak"] for turn in cell["turns"].values())
        sizes = (f"{size / 2**30:.1f} GiB" for size in (cell["base"], own, peak))
        lines.append(f"| {name} | {' | '.join(sizes)} | {flops / 1e12:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Counts the recipes that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="count recipes whose name contains this, whether or not there")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    options = parser.parse_args()
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for name, count in CELLS.items():
        if options.table or options.only not in name or (name in found and not options.only):
            continue
        print(f"{name} ...", flush=True)
        found[name] = asdict(count())
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
