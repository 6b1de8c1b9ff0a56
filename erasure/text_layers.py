"""The layers through which text enters a denoiser, as the matrices that closed forms work on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sublimate.erasure import closed_form
from sublimate.pipelines.model import Model
from sublimate.pipelines.quantised import check_unquantised


@dataclass(frozen=True)
class TextLayer:
    """One layer, cut down to the columns that text reaches.

    Attributes:
        key: full key of its weight.
        reads: the condition's entry that it reads.
        whole: the whole weight, (d_out, d_in of the layer); a view of the model's own.
        columns: the d_in columns that multiply that entry.
        table: whether it is a table of classes, whose parameter is the transpose: its rows are the layer's columns.
    """

    key: str
    reads: str
    whole: Tensor
    columns: slice
    table: bool = False

    @property
    def weight(self) -> Tensor:
        """W0, (d_out, d_in) float64 on the CPU; converted when asked for, since all layers' would fill the memory."""
        return self.whole[:, self.columns].detach().to("cpu", torch.float64)

    def change(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Factors (B, A) of the change of the model's parameter that makes W0 U V of the layer's weight.

        Args:
            u: (d_in, rank).
            v: (rank, d_in).
        """
        b, a = self.weight @ u, v
        if len(a) > len(b):
            b, a = closed_form.compress(b, a)
        full = a.new_zeros(len(a), self.whole.shape[1])
        full[:, self.columns] = a
        return (full.mT, b.mT) if self.table else (b, full)


def text_layers(model: Model) -> list[TextLayer]:
    """The model's text layers, in the order of its entry points.

    Raises:
        ValueError: when no text enters the model, or it enters through something that is not linear or is quantised.
    """
    layers = []
    for point in model.text_entry_points():
        layer = model.component(point.component).get_submodule(point.module_name)
        if not isinstance(layer, nn.Linear | nn.Embedding):
            raise ValueError(f"{point.module_name} is a {type(layer).__name__}: closed forms edit linear layers only.")
        check_unquantised({point.module_name: layer.weight}, "A closed form")
        table = isinstance(layer, nn.Embedding)
        key, whole = f"{point.component}/{point.module_name}.weight", layer.weight.mT if table else layer.weight
        layers.append(TextLayer(key, point.key, whole, point.columns, table))
    if not layers:
        raise ValueError(f"No text enters {model.source}, so there is nothing for a closed form to edit.")
    return layers
