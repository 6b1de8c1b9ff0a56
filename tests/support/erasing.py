"""What the tests of fine-tuning erasers share."""

from __future__ import annotations

import torch

from sublimate.erasure.fine_tuning import StudentObjective


def disturb(objective: StudentObjective) -> None:
    """Moves the student's weights, so that it differs from the frozen network."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in objective.player.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
