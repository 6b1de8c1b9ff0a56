"""Measures Ink's detector: held-out handwriting read right, decoded too, and broken pictures rejected.

python benchmarks/detector.py     # writes results/detector.json
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sublimate.evaluation.agreement import agreement, read
from sublimate.evaluation.detectors import open_detector
from sublimate.evaluation.hardware import hardware_line
from sublimate.evaluation.intervals import Rate, plain
from sublimate.training.ink.corruptions import KINDS, broken
from sublimate.training.ink.detector import InkDetector
from sublimate.training.ink.vocabulary import GROUPS
from sublimate.training.ink.world import sample

RESULTS = Path(__file__).parent / "results"


@torch.no_grad()
def decoded(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """What the autoencoder makes of pictures."""
    parts = [autoencoder.decode(autoencoder.encode(2 * x - 1).latent_dist.mean).sample for x in images.split(100)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", type=Path, help="a file to measure instead of the packaged one")
    parser.add_argument("--autoencoder", type=Path, help="a folder to use instead of the packaged one")
    parser.add_argument("--n", type=int, default=10_000)
    options = parser.parse_args()
    detector = InkDetector.load(options.detector) if options.detector else open_detector("ink")
    with as_file(files("sublimate.assets") / "ink" / "vae") as packaged:
        autoencoder = AutoencoderKL.from_pretrained(options.autoencoder or packaged).float().eval()
    images, glyphs = sample(range(options.n), "held_out")
    expected = [{group: GROUPS[group][i] for group, i in zip(GROUPS, glyph, strict=True)} for glyph in glyphs]
    record: dict[str, Any] = {"n": options.n}
    for name, shown in (("held out", images), ("held out, decoded", decoded(autoencoder, images))):
        found = agreement(detector, shown, expected)
        record[name] = {group: plain(rate) for group, rate in found.groups.items()}
        print(name, {group: str(rate) for group, rate in found.groups.items()}, flush=True)
    record["rejected as no digit"] = {}
    for kind in KINDS:
        batch = broken(range(options.n // 2), 12345, [kind])
        no_digit = len(GROUPS["digit"])
        asked = batch.targets[:, 0] == no_digit
        if not bool(asked.any()):
            continue
        seen = read(detector, batch.images[asked]).choices["digit"] == no_digit
        rate = Rate.of(seen.tolist())
        record["rejected as no digit"][kind] = plain(rate)
        print(kind, rate, flush=True)
    record["hardware"] = hardware_line()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "detector.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
