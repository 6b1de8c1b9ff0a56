"""ESD's cost per update on Ink: the packaged eraser beside a loop written literally from the method's description.

    python benchmarks/esd_cost.py     # writes results/esd_cost.json

The literal loop samples afresh for every update, up to one random step with the student as it is; ours takes ten
updates from each sampling. Same concepts, terms, batch, rate and number of updates; in one process, in turns. What is
counted are network passes per sample (forward 1, backward 2).
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from typing import Any

import torch
from demo import CONCEPT, RESULTS, drawing, measure, remembering
from torch import Tensor, nn

from sublimate.diffusion.guidance import guided
from sublimate.diffusion.samplers import ddim
from sublimate.erasure.request import Concept
from sublimate.erasure.weights import select
from sublimate.evaluation.erasure_result import ErasureResult
from sublimate.evaluation.hardware import hardware_line
from sublimate.evaluation.ink_demo import ink_eraser, ink_request
from sublimate.evaluation.intervals import plain
from sublimate.pipelines.model import Model, open_model

MEASURED = (
    "learning_rate=1e-4",
    'templates=["{}", "a {}", "the digit {}", "the number {}", "a drawing of a {}", "a {} in red", "a neon {}", '
    '"{}, striped"]',
)
"""ESD's options here and in the demo's cells, from before Ink's own became what they are."""
METHOD, CHANGES = "esd", ("weights=x", "updates_per_rollout=10", "max_train_steps=8", *MEASURED)


class Passes:
    """Counts a network's passes; copies of the network made later count here too."""

    def __init__(self, network: nn.Module) -> None:
        self.counted = 0.0
        network.register_forward_hook(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Passes:
        return self

    def __call__(self, network: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.counted += len(args[0]) * (3 if output.sample.requires_grad else 1)


class LiteralESD:
    """Per update: sampling with the student up to a random step, two frozen passes, one that trains, Adam."""

    def __init__(self, model: Model, config: Any, seed: int) -> None:
        self.model, self.config, self.request = model, config, ink_request(CONCEPT)
        self.null = model.null_condition()
        self.student, self.random = copy.deepcopy(model.denoiser), torch.Generator().manual_seed(seed)
        names = select(self.student.network, config.weights)
        self.trained = {n: p.requires_grad_() for n, p in self.student.network.named_parameters() if n in names}
        self.optimizer = torch.optim.Adam(self.trained.values(), lr=config.learning_rate)

    def update(self) -> None:
        frozen, null = self.model.denoiser, self.null
        x_t, t, told = self.sampled(self.request.erase)
        with torch.no_grad():
            y_null, y_concept = frozen(x_t, t, null).output, frozen(x_t, t, told).output
        loss = (self.student(x_t, t, told).output - (y_null - self.config.eta * (y_concept - y_null))).square().mean()
        x_t, t, told = self.sampled(self.request.preserve)
        with torch.no_grad():
            kept = frozen(x_t, t, told).output
        loss = loss + self.config.retain * (self.student(x_t, t, told).output - kept).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def sampled(self, concepts: tuple[Concept, ...]) -> tuple[Tensor, float, Any]:
        """x_t of the student's guided sampling of prompts drawn anew, at a step drawn anew."""
        config, schedule = self.config, self.model.schedule
        phrases = [self.drawn(self.drawn(concepts).phrases(config.templates)) for _ in range(config.train_batch_size)]
        told = self.model.encode_prompts([phrase.text for phrase in phrases])
        x = torch.randn(len(phrases), *self.model.latent_shape, generator=self.random)
        grid = schedule.grid(config.sampling_steps)
        stop = self.drawn(range(config.sampling_steps))
        for i in range(stop):
            x = ddim(
                lambda x_t, t: guided(self.student, x_t, t, told, self.null, config.start_guidance),
                x,
                schedule,
                grid[i : i + 2],
            )
        return x, float(grid[stop]), told

    def drawn(self, among: Any) -> Any:
        return among[int(torch.randint(len(among), (), generator=self.random))]

    def edited(self) -> Model:
        edited = open_model("ink")
        edited.denoiser.network.load_state_dict({n: p.detach() for n, p in self.trained.items()}, strict=False)
        return edited


def main() -> None:
    """Trains both in turns, measures what they did, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500, help="prompts per model")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = ink_eraser(METHOD, CHANGES).config
    updates = config.max_train_steps * config.updates_per_rollout
    models = {"literal": open_model("ink"), "ours": open_model("ink")}
    passes = {name: Passes(model.denoiser.network) for name, model in models.items()}
    literal = LiteralESD(models["literal"], config, options.seed)
    cost = {name: {"wall_seconds": 0.0, "processor_seconds": 0.0} for name in models}

    def clocked(name: str, work: Any) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        found = work()
        cost[name]["wall_seconds"] += time.perf_counter() - wall
        cost[name]["processor_seconds"] += time.process_time() - processor
        return found

    with tempfile.TemporaryDirectory() as folder:
        for turn in range(1, options.turns + 1):
            clocked("literal", lambda: [literal.update() for _ in range(updates // options.turns)])
            steps = turn * config.max_train_steps // options.turns
            keeping = (f"max_train_steps={steps}", f"output_dir={folder}", f"checkpointing_steps={steps}")
            eraser = ink_eraser(METHOD, (*CHANGES, *keeping))
            edit = clocked("ours", lambda e=eraser: e.fit(models["ours"], ink_request(CONCEPT), seed=options.seed))
            print(turn, cost, {name: count.counted for name, count in passes.items()}, flush=True)
    for name, count in passes.items():
        cost[name] |= {"passes_per_update": count.counted / config.train_batch_size / updates}
    edit.apply(models["ours"])
    before, record = (
        remembering(drawing(open_model("ink"))),
        {"updates": updates, "n": options.n, "seed": options.seed},
    )
    for name, edited in (("literal", literal.edited()), ("ours", models["ours"])):
        record[name] = {**cost[name], "rates": _rates(measure(drawing(edited), before, options.n, options.seed))}
    units = ("passes_per_update", "processor_seconds", "wall_seconds")
    record["ours_over_literal"] = {unit: cost["ours"][unit] / cost["literal"][unit] for unit in units}
    record["note"] = "The machine was shared and the process suspended at times: wall seconds hold that too."
    record["hardware"] = hardware_line()
    (RESULTS.parent / "esd_cost.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record["ours_over_literal"], {n: record[n]["rates"]["target"]["after"]["value"] for n in models})


def _rates(result: ErasureResult) -> dict[str, Any]:
    return {name: {"before": plain(r.before), "after": plain(r.after)} for name, r in result.rates.items()}


if __name__ == "__main__":
    main()
