"""Tiny checkpoints as open models, opened when a test first asks for one."""

from __future__ import annotations

import pytest
import torch
from pictures import shown_to
from students import prompts_of

from sublimate.pipelines.model import Model, open_model


class Opened(dict[str, Model]):
    """Name of a checkpoint's fixture -> its model, opened once.

    Args:
        request: of the fixture that lives as long as the models shall.
    """

    def __init__(self, request: pytest.FixtureRequest) -> None:
        super().__init__()
        self._request = request

    def __missing__(self, name: str) -> Model:
        self[name] = open_model(self._request.getfixturevalue(name))
        return self[name]


def draw(model: Model, seed: int = 0):
    """x_t, two times and a condition."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn((2, *model.latent_shape), generator=generator)
    t = model.schedule.uniform_time(torch.tensor([0.9, 0.3], dtype=torch.float64))
    condition = model.encode_prompts(prompts_of(model) or ["", ""])
    return x_t, t, condition.replace(**shown_to(model, 2))
