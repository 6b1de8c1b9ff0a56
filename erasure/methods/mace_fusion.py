"""MACE's closed forms: a change for every concept by itself, and one weight per layer that fuses them all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sublimate.erasure import closed_form
from sublimate.erasure.closed_form_eraser import ClosedFormEraser
from sublimate.erasure.eraser import Changes
from sublimate.erasure.request import Request, Templates
from sublimate.erasure.text_layers import text_layers
from sublimate.erasure.token_rows import Rows, Tokens, concept_rows, read_rows
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.model import Model
from sublimate.training.config import Config
from sublimate.training.data import read_prompts

_BATCH = 32


class MACEFusionConfig(Config):
    """Options of MACE's closed forms.

    Attributes:
        tokens: which rows are a concept's, see `erasure/token_rows.py`. "tail" has the words after it, whose rows have
            seen it: the authors refine only those, and leave the concept's own to their LoRAs.
        templates: prompts with `{}` in which concepts, erased and preserved, are encoded.
        prior: a file of prompts, one per line, all of whose rows are held: the authors' captions of COCO. They are
            summed in parts, so their number costs time alone.
        refine_preserve: lambda_1, weight of each held row in a concept's own change; 0.1 is recalled (not verified).
        fuse_preserve: lambda_2, weight of each held row in the fusion. The authors' code raises it with the number of
            concepts, of which each adds rows that pull the other way.
        lam: pull towards the old weights, in both. The authors have none: their prior spans the space, where 0 is
            allowed here too. It is not scale-free; see `UCEConfig`.
    """

    tokens: Tokens = "tail"
    templates: Templates = ("{}",)
    prior: Path | None = None
    refine_preserve: float = Field(default=0.1, ge=0)
    fuse_preserve: float = Field(default=1.0, ge=0)
    lam: float = Field(default=0.5, ge=0)


class MACEFusion(ClosedFormEraser):
    """The closed-form half of Mass Concept Erasure (Lu et al. 2024), for hundreds of concepts in one solve.

    Closed-form refinement finds for every concept i, by itself, the change dW_i that minimises

        sum_j |(W0 + dW_i) c_ij - W0 g_ij|^2 + lambda_1 sum_k |dW_i c_k|^2 + lam |dW_i|_F^2

    over its rows c_ij in context with its anchor's rows g_ij, and held rows c_k. The fusion is the W that minimises

        sum_i sum_j |W c_ij - (W0 + dW_i) c_ij|^2 + lambda_2 sum_k |W c_k - W0 c_k|^2 + lam |W - W0|_F^2

    so that no concept's change disturbs another's rows. All dW_i = W0 D_i share D_i between layers, and with it the
    fusion W = W0 (I + D): its sums are as large as the embedding, however many concepts there are.

    Left out of MACE are its LoRAs, fine-tuned to take attention off segmented objects: dW_i is theirs in the paper,
    and the refinement's here. Hence the name.
    """

    Config = MACEFusionConfig
    paper: ClassVar[str] = "2403.06135"

    def solve(
        self, model: Model, request: Request, *, seed: int, detector: Detector | None, progress: bool
    ) -> Changes:
        config: MACEFusionConfig = self.config
        layers = text_layers(model)
        held = held_moments(model, request, config)
        cc = {key: config.fuse_preserve * moment for key, moment in held.items()}
        moved: dict[str, Tensor] = {}
        for concept in request.erase:
            for key, rows in concept_rows(model, [concept], config.templates, config.tokens, anchored=True).items():
                change = refined(rows, config.refine_preserve, held.get(key), config.lam) - rows.own
                ones = torch.ones(len(rows.own))
                cc[key] = closed_form.second_moment(rows.own, ones, cc.get(key))
                moved[key] = closed_form.cross_moment(change, rows.own, ones, moved.get(key))
        factors = {key: fused(cc[key], moved[key], config.lam) for key in {layer.reads for layer in layers}}
        return Changes(low_rank={layer.key: layer.change(*factors[layer.reads]) for layer in layers})


def refined(rows: Rows, preserve: float, held: Tensor | None, lam: float) -> Tensor:
    """(I + D) c_j: the embeddings that the unedited layers would have to read to do what a concept's own change does.

    Args:
        rows: c_j and their anchors g_j, (m, d_in).
        preserve: lambda_1.
        held: second moment of held rows, (d_in, d_in).
        lam: pull towards no change.

    Returns:
        (m, d_in) float64.
    """
    own, moment = rows.own, None if held is None else preserve * held
    right = closed_form.right_factor(own, torch.ones(len(own)), own[:0], own.new_zeros(0), lam, moment)
    return own + own @ right.mT @ (rows.anchors - own)


def fused(cc: Tensor, moved: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """(U, V) of the change W0 U V of every layer W0.

    Args:
        cc: sum_ij c_ij c_ij^T + lambda_2 sum_k c_k c_k^T, (d_in, d_in).
        moved: sum_ij D_i c_ij c_ij^T, (d_in, d_in); held rows are not moved.
        lam: pull towards no change.
    """
    # D (cc + lam I) = moved, solved on the range of `moved`, which gives D its rank in spite of rounding.
    left, right = closed_form.compress(moved, torch.eye(len(cc)))
    return left, closed_form.solve_ridge(cc, right, lam)


def held_moments(model: Model, request: Request, config: MACEFusionConfig) -> dict[str, Tensor]:
    """sum_k c_k c_k^T by the condition's key; without keys when nothing is held.

    Raises:
        FileNotFoundError: when there is no file of the prior's prompts.
        ValueError: when a prompt is too long.
    """
    moments: dict[str, Tensor] = {}
    for key, rows in _held_rows(model, request, config):
        moments[key] = closed_form.second_moment(rows, torch.ones(len(rows)), moments.get(key))
    return moments


def _held_rows(model: Model, request: Request, config: MACEFusionConfig) -> Iterator[tuple[str, Tensor]]:
    for concept in request.preserve:
        found = concept_rows(model, [concept], config.templates, config.tokens, anchored=False)
        yield from ((key, rows.own) for key, rows in found.items())
    prompts = [] if config.prior is None else read_prompts(config.prior)
    for start in range(0, len(prompts), _BATCH):
        with torch.no_grad():
            yield from read_rows(model, model.encode_prompts(prompts[start : start + _BATCH])).items()
