"""Numbers that left the range of their precision, found where they are looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from sublimate.pipelines.placement import name_of

if TYPE_CHECKING:
    from sublimate.pipelines.model import Model


def finite(model: Model, made: Tensor, what: str) -> Tensor:
    """What a model made, unless it is no number any more. Waits for a GPU, so it is for results, not for every call.

    Args:
        model: what made it.
        made: latents, media or states, of any shape.
        what: what they are called.

    Raises:
        ValueError: for an infinity or NaN.
    """
    if is_fake(made) or made.isfinite().all():  # shapes alone have no values
        return made
    precision = name_of(model.dtype)
    if model.dtype == torch.float16:
        raise ValueError(
            f"The {what} of {model.source} overflow float16 (beyond 65504): open it in bfloat16 or float32."
        )
    raise ValueError(
        f"The {what} of {model.source} are not finite in {precision}: its weights, or an edit of them, are damaged."
    )
