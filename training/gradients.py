"""The gradients of a turn: averaged over processes, and clipped by their norm, sharded or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BUCKET = 64 * 2**20
"""Elements of a message, 256 MiB in float32."""


class Diverged(ValueError):
    """A loss or gradient is no longer finite; checkpoints are as they were, what trained is lost."""


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Mean over processes; explicit, so that it also holds for losses DDP's hooks cannot see.

    Parameters without a gradient get zeros. Those of sharded players are averaged already, as they were cut. Gradients
    travel in messages of at most `BUCKET` elements, or of one gradient: a second copy of all would cost as much as a
    full player's weights. While one travels the next is packed.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes == 1:
        return
    travelling = None
    for gradients in _buckets([p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]):
        packed = torch.cat([gradient.flatten() for gradient in gradients])
        sent = gradients, packed, torch.distributed.all_reduce(packed, async_op=True)
        if travelling is not None:
            _unpack(*travelling)
        travelling = sent
    if travelling is not None:
        _unpack(*travelling)


def _unpack(gradients: Sequence[Tensor], packed: Tensor, work: torch.distributed.Work) -> None:
    """Waits for a message of sums, and gives the gradients their means."""
    work.wait()
    packed /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, packed.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def refuse_diverged(taken: Sequence[Mapping[str, Tensor]], step: int) -> None:
    """Asks about all turns of a step at once, so that an accelerator is waited for once; their players have moved.

    Args:
        taken: what each turn logs, its "<turn>/gradient_norm" among it.
        step: for the message.

    Raises:
        Diverged: when one is not finite.
    """
    norms = {name: value for logs in taken for name, value in logs.items() if name.endswith("/gradient_norm")}
    finite = torch.stack([norm.float() for norm in norms.values()]).isfinite().tolist() if norms else []
    if not all(finite):
        turn, _, _ = list(norms)[finite.index(False)].rpartition("/")
        raise Diverged(
            f"The gradient of turn {turn!r} is not finite at step {step}: lower the learning rate or resume from an "
            "earlier checkpoint."
        )


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The gradients in order, in as few messages as their sizes allow."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.numel() for g in bucket) + gradient.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients, sharded ones among them, so that their L2 norm is at most `max_norm`; returns what it was."""
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain if p.grad is not None])
    if sharded:
        shares = [p.grad.to_local() for p in sharded if isinstance(p.grad, DTensor)]
        squared = torch.nn.utils.get_total_norm(shares).square()
        torch.distributed.all_reduce(squared, group=sharded[0].device_mesh.get_group())
        norm = (squared + norm.to(squared).square()).sqrt()
    for group in (plain, sharded):
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
