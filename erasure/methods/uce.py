"""UCE: one closed-form change of every layer through which text enters, for many concepts at once."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sublimate.erasure import closed_form
from sublimate.erasure.closed_form_eraser import ClosedFormEraser
from sublimate.erasure.eraser import Changes
from sublimate.erasure.request import Request, Templates
from sublimate.erasure.text_layers import text_layers
from sublimate.erasure.token_rows import Rows, Tokens, request_rows
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
            nothing, beside rows of norm 1 (and classes, which are one-hot) it keeps a third of the concept.
        lam_relative: multiply lam by the mean squared norm of the erased rows, which makes it scale-free; 0.5 is then
            a strong pull.
    """

    tokens: Tokens = "tail"
    templates: Templates = ("{}",)
    erase_scale: float = Field(default=1.0, gt=0)
    preserve_scale: float = Field(default=1.0, ge=0)
    lam: float = Field(default=0.5, ge=0)
    lam_relative: bool = False


class UCE(ClosedFormEraser):
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
        layers = text_layers(model)
        rows = request_rows(model, request, config.templates, config.tokens)
        factors = {key: uce_factors(*rows[key], config) for key in {layer.reads for layer in layers}}
        return Changes(low_rank={layer.key: layer.change(*factors[layer.reads]) for layer in layers})


def uce_factors(
    erased: Rows, kept: Tensor, config: UCEConfig, erased_before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(U, V) of the change W0 U V that minimises UCE's objective for every layer W0 that reads these rows.

    Args:
        erased: rows c_i and their anchors g_i.
        kept: rows c_j, (k, d_in); k may be 0.
        config: weights and ridge.
        erased_before: rows whose erasure W0 holds already, preserved with the weight of erased ones.
    """
    own = erased.own
    before = own[:0] if erased_before is None else erased_before
    return closed_form.anchored_update(
        own,
        erased.anchors,
        torch.full((len(own),), config.erase_scale),
        torch.cat([kept, before]),
        torch.cat([torch.full((len(kept),), config.preserve_scale), torch.full((len(before),), config.erase_scale)]),
        closed_form.ridge(config.lam, own, relative=config.lam_relative),
    )
