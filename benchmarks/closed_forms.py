"""Times UCE of a thousand concepts on a model of Stable Diffusion 1.5's size; nothing is downloaded.

    python benchmarks/closed_forms.py                   # writes results/closed_forms.json, run by run
    python benchmarks/closed_forms.py --tokens last     # one of the two ways to choose rows

Weights are random and the vocabulary is made up at its real size: what is measured is cost, and how near edited layers
come to what was asked of them, not what a model draws.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from full_size import CONSONANTS, LENGTH, SYLLABLES, sd15

from sublimate.erasure.methods import uce
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.token_rows import concept_rows
from sublimate.evaluation.hardware import hardware_line
from sublimate.pipelines.model import Model

RESULTS = Path(__file__).parent / "results"


def names(count: int) -> list[str]:
    """Made-up names of two words, two to six tokens each."""
    draw = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < count:
        words = ("".join(draw.choices(SYLLABLES, k=draw.choice((2, 2, 3)))) + draw.choice(CONSONANTS) for _ in "ab")
        found[" ".join(words)] = None
    return list(found)


class Clock:
    """Wall and processor seconds of the parts of a run, and the text encoder's work."""

    def __init__(self, model: Model) -> None:
        self.seconds: dict[str, dict[str, float]] = {}
        self.encoded = 0
        model.pipeline.text_encoder.register_forward_hook(self._count)

    def _count(self, module: Any, args: Any, output: Any) -> None:
        self.encoded += output.last_hidden_state.shape[:2].numel()

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            wall, processor = time.perf_counter(), time.process_time()
            found = work(*args, **options)
            print(name, round(time.perf_counter() - wall, 1), round(time.process_time() - processor, 1), flush=True)
            self.seconds[name] = {
                "wall": round(time.perf_counter() - wall, 2),
                "processor": round(time.process_time() - processor, 2),
            }
            return found

        return timed


def missed(model: Model, request: Request, config: uce.UCEConfig, before: dict[str, torch.Tensor]) -> float:
    """How far edited layers are from what they should do with 100 erased concepts, relative to unedited ones."""
    some = request.erase[:: max(1, len(request.erase) // 100)]
    rows = concept_rows(model, some, config.templates, config.tokens, anchored=True)["text"]
    off = total = 0.0
    for key, old in before.items():
        weight, old = model.parameters()[key].detach().double(), old.double()
        wanted = rows.anchors @ old.T
        off += float((rows.own @ weight.T - wanted).square().sum())
        total += float((rows.own @ old.T - wanted).square().sum())
    return (off / total) ** 0.5


def measure(model: Model, request: Request, tokens: str, folder: Path) -> dict[str, Any]:
    """One run of the packaged eraser: rows, solve, write-back into the model, and the edit's file."""
    clock, eraser = Clock(model), uce.UCE(tokens=tokens)
    clock.timed("hash of the weights", model.content_hash)()
    before = {key: model.parameters()[key].detach().clone() for key in _keys(model)}
    whole, uce.request_rows = uce.request_rows, clock.timed("rows", uce.request_rows)
    try:
        edit = clock.timed("fit", eraser.fit)(model, request)
    finally:
        uce.request_rows = whole
    clock.timed("write-back", edit.apply)(model)
    path = clock.timed("file", edit.save)(folder / f"closed_forms_{tokens}.safetensors")
    seconds = clock.seconds
    fit, rows = seconds.pop("fit"), seconds["rows"]
    seconds["solve"] = {unit: round(fit[unit] - rows[unit], 2) for unit in fit}
    prompts = sum(2 * len(c.phrases(eraser.config.templates)) for c in (*request.erase, *request.preserve))
    encoded = clock.encoded
    record = {
        "seconds": seconds,
        "tokens_encoded": encoded,
        # Concept and anchor of every phrase, each to the tokenizer's limit: how rows were encoded before.
        "tokens_encoded_padded_and_repeated": prompts * LENGTH,
        "ranks": sorted({len(a) for _, a in edit.low_rank.values()}),
        "file_mb": round(path.stat().st_size / 2**20, 1),
        "missed": missed(model, request, eraser.config, before),
    }
    edit.remove(model)
    path.unlink()
    return record


def _keys(model: Model) -> list[str]:
    return [f"unet/{point.module_name}.weight" for point in model.text_entry_points()]


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=1000)
    parser.add_argument("--preserve", type=int, default=100)
    parser.add_argument("--tokens", nargs="+", default=["last", "tail"], choices=["last", "tail"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs"), help="where the edit's file is written for a while"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = sd15(nullcontext())
    print("built", round(time.process_time(), 1), flush=True)
    called = names(options.concepts + options.preserve + 1)
    anchor, erase, preserve = called[0], called[1 : options.concepts + 1], called[options.concepts + 1 :]
    request = Request(tuple(Concept(name, anchor) for name in erase), tuple(preserve))
    path = RESULTS / "closed_forms.json"
    runs = json.loads(path.read_text()) if path.exists() else {}
    for tokens in options.tokens:
        run = {"concepts": len(erase), "preserved": len(preserve), **measure(model, request, tokens, options.folder)}
        run["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        run["note"] = "The machine was shared and the process suspended at times: wall seconds hold that too."
        runs[tokens] = run | {"hardware": hardware_line()}
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
