"""RECE: UCE, then in closed form the embeddings that bring the concept back, erased too, for a few rounds."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sublimate.erasure import closed_form
from sublimate.erasure.closed_form_eraser import ClosedFormEraser
from sublimate.erasure.eraser import Changes
from sublimate.erasure.methods.uce import UCEConfig, uce_factors
from sublimate.erasure.request import Request
from sublimate.erasure.text_layers import text_layers
from sublimate.erasure.token_rows import Rows, request_rows
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.model import Model


class RECEConfig(UCEConfig):
    """Options of RECE; defaults are the authors' for nudity. For styles and objects they take one round, with an
    `attack_lam` of 1e-3 for styles and hard objects.

    Attributes:
        rounds: how often what recovers the concept is found and erased.
        attack_lam: pull of recovering embeddings towards zero. Small values find stronger attacks, whose erasure
            costs more of everything else.

    The others are `UCEConfig`'s; here they hold in every round, where the authors start from a checkpoint of UCE with
    its own.
    """

    rounds: int = Field(default=3, ge=1)
    attack_lam: float = Field(default=0.1, gt=0)
    preserve_scale: float = Field(default=0.1, ge=0)
    lam: float = Field(default=0.1, gt=0)


class RECE(ClosedFormEraser):
    """Reliable and Efficient Concept Erasure (Gong et al. 2024).

    After UCE's edit, a round finds for every erased row c the embedding that makes all edited layers together do for
    it what the unedited ones did for c (`closed_form.recovering_rows`), and sends it to c's anchor by another edit
    like UCE's, which starts from the weights of the round before. It also holds the rows that are erased already: the
    authors leave that to the ridge, and on Ink the concept then comes back. Every layer that reads the same embedding
    is multiplied by one matrix from the right, W0 (I + U V), so a round costs one solve however many layers there are.
    """

    Config = RECEConfig
    paper: ClassVar[str] = "2407.12383"

    def solve(
        self, model: Model, request: Request, *, seed: int, detector: Detector | None, progress: bool
    ) -> Changes:
        config: RECEConfig = self.config
        layers = text_layers(model)
        rows = request_rows(model, request, config.templates, config.tokens)
        factors = {}
        for key in {layer.reads for layer in layers}:
            size = rows[key][0].own.shape[1]
            moment = torch.zeros(size, size, dtype=torch.float64)
            for weight in (layer.weight for layer in layers if layer.reads == key):
                moment += weight.mT @ weight
            factors[key] = _rounds(*rows[key], moment, config)
        return Changes(low_rank={layer.key: layer.change(*factors[layer.reads]) for layer in layers})


def _rounds(erased: Rows, kept: Tensor, moment: Tensor, config: RECEConfig) -> tuple[Tensor, Tensor]:
    """(U, V) of UCE's edit and all rounds after it."""
    u, v = uce_factors(erased, kept, config)
    before = erased.own
    for _ in range(config.rounds):
        recovering = closed_form.recovering_rows(erased.own, moment, u, v, config.attack_lam)
        more_u, more_v = uce_factors(Rows(recovering, erased.anchors), kept, config, before)
        # (I + U V)(I + U' V') = I + U V + (U' + U (V U')) V'
        u, v = closed_form.compress(torch.cat([u, more_u + u @ (v @ more_u)], 1), torch.cat([v, more_v]))
        before = torch.cat([before, recovering])
    return u, v
