"""SPEED: a closed-form change confined to the directions that preserved concepts do not use."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from sklearn.cluster import KMeans
from torch import Tensor

from sublimate.erasure import closed_form
from sublimate.erasure.closed_form_eraser import ClosedFormEraser
from sublimate.erasure.eraser import Changes
from sublimate.erasure.request import Request, Templates
from sublimate.erasure.text_layers import TextLayer, text_layers
from sublimate.erasure.token_rows import Rows, Tokens, read_rows, request_rows
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.model import Model
from sublimate.training.config import Config
from sublimate.training.randomness import key as keyed


class SPEEDConfig(Config):
    """Options of SPEED.

    Attributes:
        tokens: which rows are a concept's, see `erasure/token_rows.py`; the authors take the "last" token, for nudity
            all.
        templates: prompts with `{}` in which concepts, erased and preserved, are encoded.
        layers: "values" of cross-attention (the authors'), with the pooled path where there is one beside them, or
            "all" layers through which text enters.
        threshold: directions on which preserved rows have a smaller mean square may change.
        lam: pull towards the old weights, per erased row.
        influence_filter: preserve only rows that an unconfined edit would move more than the average one (influence-
            based prior filtering).
        augmentations: noisy copies of each preserved row, along the direction that its layer reads least (where it is
            wider than tall, one of those it does not read); those moved more than average are preserved too (directed
            prior augmentation).
    """

    tokens: Tokens = "last"
    templates: Templates = ("{}",)
    layers: Literal["values", "all"] = "values"
    threshold: float = Field(default=0.1, gt=0)
    lam: float = Field(default=1.0, gt=0)
    influence_filter: bool = True
    augmentations: int = Field(default=10, ge=0)


class SPEED(ClosedFormEraser):
    """Scalable, Precise and Efficient Erasure in the null space of what is kept (Li et al. 2026).

    Every layer W0 becomes W0 + D, where D minimises

        mean_i |(W0 + D) c_i - W0 g_i|^2 + lam |D|_F^2     over all D with D = D P and D K = 0

    over erased rows c_i with their anchors' rows g_i. P projects on the directions that preserved rows hardly use; K
    are rows of the empty prompt: its first, and three centres of the others. The authors write the minimiser with two
    inverses of projected matrices, and with a ridge D K = 0 holds only nearly; here both constraints are solved
    exactly, in an orthonormal basis of the directions they leave.
    """

    Config = SPEEDConfig
    paper: ClassVar[str] = "2503.07392"

    def solve(
        self, model: Model, request: Request, *, seed: int, detector: Detector | None, progress: bool
    ) -> Changes:
        config: SPEEDConfig = self.config
        layers = text_layers(model)
        if config.layers == "values":
            if not any(layer.key.endswith(".to_v.weight") for layer in layers):
                raise ValueError(
                    f"Text enters {model.source} through no values of cross-attention: set layers to all."
                )
            layers = [layer for layer in layers if not layer.key.endswith(".to_k.weight")]
        by_key = request_rows(model, request, config.templates, config.tokens)
        null = read_rows(model, model.null_condition())
        if not null:
            raise ValueError(f"{model.source} has no null condition, which speed holds: use uce.")
        fixed = {name: _fixed_rows(null[name]) for name in {layer.reads for layer in layers}}
        changes = {}
        for layer in layers:
            rows, kept = by_key[layer.reads]
            preserved = self._preserved(layer, rows, kept, seed)
            basis = closed_form.quiet_directions(preserved, config.threshold, fixed[layer.reads])
            if basis.shape[1] == 0:
                raise ValueError(
                    "What is preserved uses every direction of the embedding: preserve less, or raise threshold."
                )
            right = closed_form.confined_factor(rows.own, basis, config.lam * len(rows.own))
            changes[layer.key] = layer.change(*closed_form.anchored_factors(rows.own, rows.anchors, right))
        return Changes(low_rank=changes)

    def _preserved(self, layer: TextLayer, erased: Rows, kept: Tensor, seed: int) -> Tensor:
        """The preserved rows as this layer needs them: those in danger, and noisy copies of them."""
        config: SPEEDConfig = self.config
        if len(kept) == 0:
            return kept
        everywhere = torch.eye(kept.shape[1], dtype=torch.float64)
        free = closed_form.confined_factor(erased.own, everywhere, config.lam * len(erased.own))
        unconfined = layer.weight @ (erased.anchors - erased.own).mT @ free

        def endangered(rows: Tensor) -> Tensor:
            moved = (rows @ unconfined.mT).norm(dim=1)
            return rows[moved >= moved.mean()]

        rows = endangered(kept) if config.influence_filter else kept
        if config.augmentations:
            least = torch.linalg.svd(layer.weight, full_matrices=True)[2][-1]
            generator = torch.Generator().manual_seed(keyed(seed, layer.key))
            draws = torch.randn((config.augmentations, len(rows), 1), dtype=torch.float64, generator=generator)
            # White noise, projected on one direction, is that direction times one normal number.
            rows = torch.cat([rows, endangered((rows + draws * least).flatten(0, 1))])
        return rows


def _fixed_rows(null: Tensor) -> Tensor:
    """The rows of the empty prompt that must not move: (tokens, d_in) -> (up to 4, d_in)."""
    first, others = null[:1], null[1:].unique(dim=0)
    if len(others) <= 3:
        return torch.cat([first, others])
    centres = KMeans(3, n_init=1, random_state=0).fit(others.numpy()).cluster_centers_
    return torch.cat([first, torch.from_numpy(centres)])
