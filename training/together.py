"""Drawing on all processes of a launch together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor


def drawn_together(count: int, draw: Callable[[slice], Tensor]) -> Tensor:
    """`count` samples, of which each process draws its share, and all get all.

    What is drawn must depend on a sample's place among all of them, and not on who draws it: the number of processes
    then changes nothing but rounding. All processes must draw the same.

    Args:
        count: how many samples.
        draw: the samples of some places, (len, ...).

    Returns:
        (count, ...), where `draw` put its own.
    """
    accelerator = Accelerator()
    processes, rank = accelerator.num_processes, accelerator.process_index
    # Shares of one size, gathered in one message: the last ones begin earlier and draw some samples again.
    share = -(-count // processes)
    firsts = [min(i * share, count - share) for i in range(processes)]
    mine = draw(slice(firsts[rank], firsts[rank] + share))
    if processes == 1:
        return mine
    parts = accelerator.gather(mine.to(accelerator.device)).split(share)
    kept = [part[i * share - first :] for i, (part, first) in enumerate(zip(parts, firsts, strict=True))]
    return torch.cat(kept).to(mine.device)
