"""UCE: one closed-form change of every layer through which text enters, for many concepts at once."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from sublimate.erasure import closed_form
from sublimate.erasure.eraser import Changes, Eraser
from sublimate.erasure.request import Request, Templates
from sublimate.erasure.token_rows import Tokens, concept_rows
from sublimate.pipelines.backbones.base import EntryPoint
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.model import Model
from sublimate.training.config import Config


class UCEConfig(Config):
    """Options of UCE.

    Attributes:
        tokens: "tail" changes every row from the concept's first token to the end of the sequence (close to the
            authors' first code, which starts at the last token), "last" the concept's last token alone (their rewrite
            of 2025); see `erasure/token_rows.py` for how anchors are aligned. "last" leaves the end token and the
            padding, which have seen the concept too, as they are.
        templates: prompts with `{}` in which concepts, erased and preserved, are encoded. Each adds its rows.
        erase_scale: weight of each erased row.
        preserve_scale: weight of each preserved row.
        lam: pull towards the old weights. It is not scale-free: beside rows of CLIP-L's norm (27.7) 0.5 is next to
            nothing, beside rows of norm 1 it keeps a third of the concept.
        lam_relative: multiply lam by the mean squared norm of the erased rows, which makes it scale-free; 0.5 is then
            a strong pull.
    """

    tokens: Tokens = "tail"
    templates: Templates = ("{}",)
    erase_scale: float = Field(default=1.0, gt=0)
    preserve_scale: float = Field(default=1.0, ge=0)
    lam: float = Field(default=0.5, ge=0)
    lam_relative: bool = False


class UCE(Eraser):
    """Unified Concept Editing (Gandikota et al. 2024).

    Every layer W0 that text enters through (keys and values of cross-attention; with joint attention the projection of
    the sequence, and that of the pooled embedding) becomes the minimiser of

        sum_i e |W c_i - W0 g_i|^2 + sum_j p |W c_j - W0 c_j|^2 + lam |W - W0|_F^2

    over erased rows c_i with their anchors' rows g_i, and preserved rows c_j. A layer's bias is added to both sides of
    every difference and drops out. The edit is exactly low-rank; its rank is bounded by the number of erased rows.
    """

    Config = UCEConfig
    paper: ClassVar[str] = "2308.14761"

    def solve(
        self, model: Model, request: Request, *, seed: int, detector: Detector | None, progress: bool
    ) -> Changes:
        config: UCEConfig = self.config
        points = model.text_entry_points()
        if not points:
            raise ValueError(f"No text enters {model.source}, so there is nothing for UCE to edit.")
        erased = concept_rows(model, request.erase, config.templates, config.tokens, anchored=True)
        kept = concept_rows(model, request.preserve, config.templates, config.tokens, anchored=False)
        factors = {}
        for key in {point.key for point in points}:
            own = erased[key].own
            preserved = kept[key].own if key in kept else own[:0]
            right = closed_form.right_factor(
                own,
                torch.full((len(own),), config.erase_scale),
                preserved,
                torch.full((len(preserved),), config.preserve_scale),
                closed_form.ridge(config.lam, own, relative=config.lam_relative),
            )
            factors[key] = closed_form.anchored_factors(own, erased[key].anchors, right)
        return Changes(low_rank={_key(point): _layer_factors(model, point, *factors[point.key]) for point in points})


def _key(point: EntryPoint) -> str:
    return f"{point.component}/{point.module_name}.weight"


def _layer_factors(model: Model, point: EntryPoint, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(B, A) of one layer's change W0 U V on the columns that text enters through."""
    layer = model.component(point.component).get_submodule(point.module_name)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{point.module_name} is a {type(layer).__name__}, and UCE edits linear layers only.")
    weight = layer.weight.detach().to("cpu", torch.float64)
    b, a = weight[:, point.columns] @ u, v
    if len(a) > len(b):
        b, a = closed_form.compress(b, a)
    full = a.new_zeros(len(a), weight.shape[1])
    full[:, point.columns] = a
    return b, full
