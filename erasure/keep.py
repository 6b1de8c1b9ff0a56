"""Terms that hold a student to the frozen network where nothing is to be erased."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.erasure.targets import Space, squared_error


def frozen_error(
    student: Denoiser, frozen: Denoiser, x_t: Tensor, t: Tensor, condition: Condition, space: Space = "output"
) -> Tensor:
    """|y_student - y_frozen|^2 per sample at the same input: (batch,), float32.

    With the null condition it pins the unconditional branch, with a preserved concept's prompt and x_t of its own it
    retains that concept, with noised latents of pictures it anchors the student there.

    Args:
        student: gets the gradient.
        frozen: the network as it was.
        x_t: noised samples, (batch, ...).
        t: their times, (batch,).
        condition: what both networks are told, of batch size 1 or batch.
        space: the quantity that is compared.
    """
    with torch.no_grad():
        target = frozen(x_t, t, condition)
    return squared_error(student(x_t, t, condition), target, space)


def l1_drift(trained: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> Tensor:
    """mean |theta - theta_0| over all trained parameters, which keeps changes sparse; a scalar.

    Args:
        trained: parameters by name, with gradient.
        originals: their values before training, at least the same names.
    """
    total = sum((parameter - originals[name].detach()).abs().sum() for name, parameter in trained.items())
    return torch.as_tensor(total) / sum(parameter.numel() for parameter in trained.values())
