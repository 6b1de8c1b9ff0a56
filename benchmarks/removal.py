"""Measures Attentive Eraser on Ink: how often a digit is still read after it was removed from its picture.

    python benchmarks/removal.py     # writes results/removal.json, condition by condition; resumes

Real renderings of held-out handwriting, alone on their page or in the middle of a larger one; the mask is the digit's
box, or its pixels. Beside it, from the same noise, what redirects no attention: sampling within the mask alone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sublimate.evaluation.agreement import read
from sublimate.evaluation.detectors import open_detector
from sublimate.evaluation.hardware import hardware_line
from sublimate.evaluation.intervals import Rate, paired_difference, plain
from sublimate.pipelines.attentive_eraser import erase_object
from sublimate.pipelines.model import open_model
from sublimate.training.ink.renderer import BACKGROUND, SIZE
from sublimate.training.ink.vocabulary import GROUPS
from sublimate.training.ink.world import sample

RESULTS = Path(__file__).parent / "results"
STEPS = 25
CONDITIONS = ((32, "box"), (48, "box"), (48, "pixels"))
SCALES = {"blending alone": 0.0, "redirected": 9.0}


def pixels(images: Tensor) -> Tensor:
    """Where pictures differ from their page, (N, 1, 32, 32)."""
    return ((images - _page()).abs().amax(1, keepdim=True) > 0.1).float()


def boxes(marks: Tensor) -> Tensor:
    """The smallest upright boxes around marks, shaped like them."""
    rows, columns = marks.amax(3, keepdim=True), marks.amax(2, keepdim=True)
    return _between(rows, 2) * _between(columns, 3)


def placed(images: Tensor, size: int, fill: Tensor) -> Tensor:
    """Pictures in the middle of a larger page."""
    page = fill.expand(len(images), images.shape[1], size, size).clone()
    middle(page)[:] = images
    return page


def middle(images: Tensor) -> Tensor:
    """The part of a page that holds the picture."""
    edge = (images.shape[-1] - SIZE) // 2
    return images[:, :, edge : edge + SIZE, edge : edge + SIZE]


def _between(marks: Tensor, dim: int) -> Tensor:
    """1 from the first mark to the last."""
    return marks.cummax(dim).values * marks.flip(dim).cummax(dim).values.flip(dim)


def _page() -> Tensor:
    return torch.tensor(BACKGROUND)[None, :, None, None]


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200)
    options = parser.parse_args()
    model, detector, no_digit = open_model("ink"), open_detector("ink"), len(GROUPS["digit"])
    images, glyphs = sample(range(options.n), "held_out")
    digits = torch.tensor([glyph.digit for glyph in glyphs])
    marks = pixels(images)
    path = RESULTS / "removal.json"
    record: dict[str, Any] = {"n": options.n, "steps": STEPS, "strength": 0.8, "seed": 0, "conditions": []}
    if path.exists() and (found := json.loads(path.read_text()))["n"] == options.n:
        record = found
    done = [(cell["page"], cell["mask"]) for cell in record["conditions"]]
    for size, kind in CONDITIONS:
        if (size, kind) in done:
            continue
        masks = placed(boxes(marks) if kind == "box" else marks, size, torch.zeros(1, 1, 1, 1))
        page = placed(images, size, _page())
        cell: dict[str, Any] = {"page": size, "mask": kind, "covers": float(masks.mean())}
        seen = {}
        for name, scale in SCALES.items():
            began = time.process_time()
            erased = erase_object(model, page, masks, scale=scale, steps=STEPS, batch_size=25)
            choice = read(detector, middle(erased)).choices["digit"]
            seen[name] = (choice == digits).tolist()
            cell[name] = {
                "same digit": plain(Rate.of(seen[name])),
                "another digit": plain(Rate.of(((choice != digits) & (choice != no_digit)).tolist())),
                "no digit": plain(Rate.of((choice == no_digit).tolist())),
                "processor seconds": round(time.process_time() - began, 1),
            }
            print(size, kind, name, {k: v["value"] for k, v in cell[name].items() if isinstance(v, dict)}, flush=True)
        cell["change of same digit"] = plain(paired_difference(*seen.values()))
        record["conditions"].append(cell)
        record["hardware"] = hardware_line()
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
