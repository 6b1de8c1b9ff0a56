"""How a study has a model draw: prompts and a seed to images, on all processes of a launch together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model
from sublimate.training.together import accelerator, drawn_together

Generate = Callable[[Sequence[str], int], Tensor]
"""(prompts, seed) -> images (N, 3, H, W) in [0, 1]; the same seed must give both models the same noise."""


def drawing(model: Model, *, progress: bool = False, **options: Any) -> Generate:
    """The model as a study calls it: each process draws its share of the prompts, and all get all images, on the CPU.

    An image's noise depends on the seed and on its place among all prompts, so the number of processes changes nothing
    but rounding. All processes must draw the same.

    Args:
        model: what draws, the same in every process.
        progress: show the main process's bar.
        options: of `generate`; sampled as the checkpoint asks unless given.
    """

    def draw(texts: Sequence[str], seed: int) -> Tensor:
        shown = progress and accelerator().is_main_process

        def share(places: slice) -> Tensor:
            first = places.start
            return generate(model, texts[places], seed=seed, first=first, device="cpu", progress=shown, **options)

        return drawn_together(len(texts), share)

    return draw
