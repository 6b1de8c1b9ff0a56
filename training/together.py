"""What all processes of a launch do together: drawing, and agreeing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor

PATIENCE = timedelta(hours=6)
"""How long processes wait for another, which may be writing a large checkpoint: NCCL gives up after ten minutes."""


_MESSAGE = 64
"""Samples that a process sends at once."""


def accelerator(**options: Any) -> Accelerator:
    """accelerate's; the first one of a process joins the others of its launch."""
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)], **options)


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
    launched = accelerator()
    processes, rank = launched.num_processes, launched.process_index
    # Shares of one size, gathered in one message: the last ones begin earlier and draw some samples again.
    share = -(-count // processes)
    firsts = [min(i * share, count - share) for i in range(processes)]
    mine = draw(slice(firsts[rank], firsts[rank] + share))
    if processes == 1:
        return mine
    # Message by message: what all draw together may be more than a device holds.
    gathered = [launched.gather(some.to(launched.device)).to(mine.device) for some in mine.split(_MESSAGE)]
    parts = [torch.cat([some.chunk(processes)[rank] for some in gathered]) for rank in range(processes)]
    return torch.cat([part[i * share - first :] for i, (part, first) in enumerate(zip(parts, firsts, strict=True))])


def everywhere(found: bool) -> bool:
    """Whether something is so in every process; all must ask."""
    launched = accelerator()
    count = launched.reduce(torch.tensor(float(found), device=launched.device), "sum")
    return int(count) == launched.num_processes
