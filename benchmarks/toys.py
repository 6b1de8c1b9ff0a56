"""What each objective makes of a Gaussian student that cannot be the teacher: docs/toys.svg.

    python benchmarks/toys.py

Teachers are mixtures of two Gaussians, the student is x0 = a z + b, times are six in [0.3, 0.6] of x_t = cos t x0 +
sin t eps. Scores, critics and ratios are exact (`tests/support/oracles.py`), so only the objectives differ. Where the
modes overlap, the objectives differ in width. Where they are apart, forward KL covers both from any start, and reverse
KL and Jensen-Shannon may stay on one. EM distillation (30 steps, without noise cancellation) is drawn once per seed:
it comes near forward KL where its chains cross between the modes, and stays on one where they do not.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.mixtures import GaussianMixture
from sublimate.evaluation.hardware import hardware_line
from sublimate.training.objective import Batch
from sublimate.training.objectives.em_distillation import EMDistillation, EMDistillationConfig
from sublimate.training.objectives.f_distill import FDistill, FDistillConfig

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "support"))
from oracles import drawn, gradient, made_exact, mixture, sobol, tiny_model  # noqa: E402

TIMES = 0.3 + 0.3 * (torch.arange(6, dtype=torch.float64) + 0.5) / 6
TEACHERS = {
    "one mode in four": (mixture([0.25, 0.75], [-1.0, 1.0], [0.4, 0.4]), (1.2, 0.0)),
    "two modes, started on one": (mixture([0.5, 0.5], [-2.0, 2.0], [0.4, 0.4]), (0.4, 1.9)),
    "two modes, started on both": (mixture([0.5, 0.5], [-2.0, 2.0], [0.4, 0.4]), (1.5, 0.2)),
}
COLOURS = {"reverse KL": "#c0392b", "Jensen-Shannon": "#8e44ad", "forward KL": "#2471a3", "EM distillation": "#1e8449"}
CHAIN = {"langevin_steps": 30, "step_eps": 0.02, "step_z": 0.02, "noise_cancellation": False}
UPDATES, SEEDS = 300, (0, 1, 2)


Students = list[tuple[float, float]]


class Noise:
    """Normal numbers of one generator for every chain of a batch."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator

    def normal(self, shape: tuple[int, ...], device: object) -> Tensor:
        return torch.randn(self.count, *shape, dtype=torch.float64, generator=self.generator)


def weighted(divergence: str) -> Callable[[GaussianMixture, tuple[float, float]], Students]:
    """Descends an f-divergence with quasi-random points, the same in every update."""

    def minimised(teacher: GaussianMixture, start: tuple[float, float]) -> Students:
        options = {"ratio_bounds": None, "ratio_normalization": False, "weight_normalization": False}
        config = FDistillConfig(
            divergence=divergence, guidance_scale=1.0, gan_weight=0.0, sample_normalization=False, **options
        )
        objective = made_exact(FDistill(tiny_model(), config), teacher, *start)
        batch = drawn(objective, TIMES, *sobol(10))
        return [_descended(objective, lambda update: batch)]

    return minimised


def em(teacher: GaussianMixture, start: tuple[float, float]) -> Students:
    """Descends EM distillation with fresh chains in every update, once per seed."""
    return [_em(teacher, start, seed) for seed in SEEDS]


def _em(teacher: GaussianMixture, start: tuple[float, float], seed: int) -> tuple[float, float]:
    config = EMDistillationConfig(start_log_snr=None, **CHAIN)
    objective = made_exact(EMDistillation(tiny_model(), config), teacher, *start)

    def batch(update: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * seed + update)
        z, eps = torch.randn(2, 400, dtype=torch.float64, generator=generator)
        drawn(objective, TIMES, z, eps)
        return Batch(Condition(), Noise(400 * len(TIMES), generator))  # type: ignore[arg-type]

    return _descended(objective, batch)


def _descended(objective: FDistill | EMDistillation, batch: Callable[[int], Batch]) -> tuple[float, float]:
    """(a, b) after Adam with a step that falls to zero, averaged over the last fifty updates."""
    student = objective.student
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    path = []
    for update in range(UPDATES):
        gradient(objective, batch(update))
        optimizer.step()
        schedule.step()
        path.append([float(student.a.detach()), float(student.b.detach())])
    a, b = torch.tensor(path[-50:], dtype=torch.float64).mean(0).tolist()
    return round(a, 5), round(b, 5)


OBJECTIVES = {
    "reverse KL": weighted("reverse_kl"),
    "Jensen-Shannon": weighted("jensen_shannon"),
    "forward KL": weighted("forward_kl"),
    "EM distillation": em,
}


def ranged(students: Students, index: int) -> str:
    """The value all seeds agree on to two digits, or from the least to the greatest."""
    ends = [f"{round(end(pair[index] for pair in students), 2) + 0.0:.2f}" for end in (min, max)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def panel(title: str, teacher: GaussianMixture, found: dict[str, Students], top: int) -> list[str]:
    """One panel of the figure: the teacher's density in grey and every student's in its colour."""
    x = torch.linspace(-4, 4, 321, dtype=torch.float64)

    def curve(density: Tensor) -> str:
        points = zip(x.tolist(), density.tolist(), strict=True)
        return " ".join(f"{60 + 75 * (u + 4):.1f},{top + 150 - 140 * v:.1f}" for u, v in points)

    parts = [f'<text x="60" y="{top}" font-size="15">{title}</text>']
    density = teacher.log_prob(x[:, None]).exp()
    parts.append(f'<polyline points="{curve(density)}" fill="#ddd" stroke="#888"/>')
    for row, (name, students) in enumerate(found.items()):
        for a, b in students:
            normal = torch.exp(-0.5 * ((x - b) / a) ** 2) / (abs(a) * math.sqrt(2 * math.pi))
            parts.append(f'<polyline points="{curve(normal)}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        label = f"{name}: a = {ranged(students, 0)}, b = {ranged(students, 1)}"
        parts.append(f'<text x="680" y="{top + 18 * row}" font-size="13" fill="{COLOURS[name]}">{label}</text>')
    return parts


def main() -> None:
    """Minimises, draws and writes the numbers."""
    found = {
        title: {name: minimise(teacher, start) for name, minimise in OBJECTIVES.items()}
        for title, (teacher, start) in TEACHERS.items()
    }
    parts = [
        line
        for index, (title, students) in enumerate(found.items())
        for line in panel(title, TEACHERS[title][0], students, 40 + 190 * index)
    ]
    size = f'width="920" height="{40 + 190 * len(found)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif"><rect {size} fill="white"/>'
    figure = HERE.parent / "docs" / "toys.svg"
    figure.parent.mkdir(exist_ok=True)
    figure.write_text("\n".join([head, *parts, "</svg>"]) + "\n")
    record = {"students": found, "updates": UPDATES, "chain": CHAIN, "seeds": SEEDS, "hardware": hardware_line()}
    (HERE / "results" / "toys.json").write_text(json.dumps(record, indent=1) + "\n")
    for title, students in found.items():
        print(title, students)


if __name__ == "__main__":
    main()
