"""A kind for tests: scales what named modules put out, and adds a vector to it."""

from __future__ import annotations

import torch
from torch import nn

from sublimate.pipelines.edit_attachment import Built


class Shift(nn.Module):
    """scale * x + by, in x's precision."""

    def __init__(self, by, scale):
        super().__init__()
        self.scale = scale
        self.by = nn.Parameter(by.clone())

    def forward(self, x):
        return (self.scale * x.float() + self.by).to(x.dtype)


def build(model, options, tensors):
    shift = Shift(tensors["by"], options.get("scale", 1.0))
    width = options.get("width")
    if width is not None and torch.Size((width,)) != tensors["by"].shape:
        raise ValueError(f"shifted is {width} wide.")
    return Built(shift, {name: lambda module, inputs, output: shift(output) for name in options["modules"]})
