"""How a study has a model draw: prompts and a seed to images, on all processes of a launch together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model

Generate = Callable[[Sequence[str], int], Tensor]
"""(prompts, seed) -> images (N, 3, H, W) in [0, 1]; the same seed must give both models the same noise."""


def drawing(model: Model, *, progress: bool = False, **options: Any) -> Generate:
    """The model as a study calls it: each process draws its share of the prompts, and all get all images.

    An image's noise depends on the seed and on its place among all prompts, so the number of processes changes nothing
    but rounding. All processes must draw the same.

    Args:
        model: what draws, the same in every process.
        progress: show the main process's bar.
        options: of `generate`; sampled as the checkpoint asks unless given.
    """

    def draw(texts: Sequence[str], seed: int) -> Tensor:
        accelerator = Accelerator()
        processes, rank = accelerator.num_processes, accelerator.process_index
        # Shares of one size, gathered in one message: the last ones begin earlier and draw some images again.
        share = -(-len(texts) // processes)
        firsts = [min(i * share, len(texts) - share) for i in range(processes)]
        mine = texts[firsts[rank] : firsts[rank] + share]
        shown = progress and accelerator.is_main_process
        images = generate(model, mine, seed=seed, first=firsts[rank], progress=shown, **options)
        if processes == 1:
            return images
        parts = accelerator.gather(images.to(accelerator.device)).split(share)
        kept = [part[i * share - first :] for i, (part, first) in enumerate(zip(parts, firsts, strict=True))]
        return torch.cat(kept).to(images.device)

    return draw
