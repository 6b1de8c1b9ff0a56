"""Folders drawn by stock diffusers in one fresh process, which cannot import this library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pictures import stock_arguments
from safetensors.torch import save_file
from students import GLOBAL_SEED, SEEDS, stock_prompts

from sublimate.pipelines.model import Model

_PROGRAM = """
import json, sys
sys.modules["sublimate"] = None
import diffusers, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
jobs = json.load(open(sys.argv[1]))
for job in jobs:
    pipeline = DiffusionPipeline.from_pretrained(job["folder"])
    if job["lora"]:
        pipeline.load_lora_weights(job["lora"])
    if job["scheduler"]:
        kind = json.load(open(job["scheduler"] + "/scheduler_config.json"))["_class_name"]
        pipeline.scheduler = getattr(diffusers, kind).from_pretrained(job["scheduler"])
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in job["seeds"]]
    # Some stock flow pipelines draw their fresh noise from the global generator.
    torch.manual_seed(job["global_seed"])
    expected = load_file(job["expected"])
    pictures = {name: expected[name] for name in ("image", "mask_image") if name in expected}
    result = pipeline(**job["who"], **pictures, generator=generators, output_type="pt", **job["call"])
    images = torch.as_tensor(result.images if "images" in result else result.audios)
    expected = expected["images"]
    print("RESULT", job["name"], float((images - expected).abs().max()), type(pipeline).__name__)
assert not any(name.startswith("sublimate.") for name in sys.modules)
"""


class FreshProcess:
    """Collects folders and what this library draws with them, and has stock diffusers draw the same.

    Args:
        root: where to put what the process reads.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs: list[dict[str, Any]] = []

    def add(
        self,
        name: str,
        model: Model,
        images: torch.Tensor,
        folder: Path,
        call: Mapping[str, Any] | None = None,
        *,
        lora: Path | None = None,
        scheduler: Path | None = None,
    ) -> None:
        """One folder.

        Args:
            name: of the result.
            model: what the stock pipeline's arguments are made for.
            images: what it shall draw.
            folder: what it opens.
            call: options of its call; what the LoRA's or the folder's `sublimate.json` says unless given.
            lora: a folder whose LoRA and scheduler it loads on top.
            scheduler: a folder whose scheduler it has instead of its own.
        """
        expected = self.root / f"{name}.safetensors"
        save_file({"images": images.contiguous(), **stock_arguments(model, len(SEEDS))}, expected)
        if call is None:
            call = json.loads(((lora or folder) / "sublimate.json").read_text())["call"]
        if lora is not None:
            scheduler = lora / "scheduler"
        job = {"name": name, "seeds": SEEDS, "who": stock_prompts(model), "call": call, "global_seed": GLOBAL_SEED}
        paths = {"folder": folder, "lora": lora, "scheduler": scheduler, "expected": expected}
        self.jobs.append(job | {key: path and str(path) for key, path in paths.items()})

    def run(self) -> dict[str, tuple[float, str]]:
        """The largest difference, and the pipeline's class, by name."""
        (self.root / "jobs.json").write_text(json.dumps(self.jobs))
        command = [sys.executable, "-c", _PROGRAM, str(self.root / "jobs.json")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.root, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT")]
        return {name: (float(error), kind) for _, name, error, kind in lines}
