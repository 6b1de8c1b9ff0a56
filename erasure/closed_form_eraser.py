"""What closed-form erasers share with their callers: what is read and solved, counted without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sublimate.erasure.eraser import Eraser
from sublimate.erasure.request import Request
from sublimate.erasure.text_layers import text_layers
from sublimate.erasure.token_rows import request_rows
from sublimate.pipelines.model import Model
from sublimate.training.plan import Meter, TurnCost, counted, gib


@dataclass(frozen=True)
class Solve:
    """One entry of the condition, for whose layers one system is solved.

    Attributes:
        erased, preserved: its rows.
        width: numbers per row; the system is as large, or as the rows where they are fewer.
        layers: how many read it.
        written: bytes of their weights.
    """

    erased: int
    preserved: int
    width: int
    layers: int
    written: int


@dataclass(frozen=True)
class ClosedFormPlan:
    """What a closed form reads and solves.

    Attributes:
        base: bytes of the model.
        prompts: texts that are encoded, each once however often it comes up.
        reading: operations of the text encoders, and the most bytes alive while they run and the rows are kept.
        solves: by the condition's key.
    """

    base: int
    prompts: int
    reading: TurnCost
    solves: Mapping[str, Solve]

    def lines(self) -> list[str]:
        """The plan as text, a line for each part."""
        flops, peak = self.reading.flops / 1e12, gib(self.reading.peak)
        reading = f"reading {self.prompts} prompts: {flops:,.4g} TFLOP, peak {peak}"
        solves = [
            f"solving for {key}: {s.erased} rows erased and {s.preserved} preserved, {s.width} wide, float64; "
            f"{s.layers} layers of {gib(s.written)} edited"
            for key, s in self.solves.items()
        ]
        return [f"weights: {gib(self.base)}", reading, *solves]


class ClosedFormEraser(Eraser):
    """An eraser that solves for the layers through which text enters; its options have `templates` and `tokens`."""

    low_rank = True

    def plan(self, model: Model, request: Request) -> ClosedFormPlan:
        """What is read and solved for the concepts; prompts of a method's own (MACE's prior) come on top.

        Linear algebra needs some matrices of a row's width squared, or of the largest layer, in float64.
        """
        config, layers = self.config, text_layers(model)
        concepts = (*request.erase, *request.preserve)
        texts = {phrase.text for concept in concepts for phrase in concept.phrases(config.templates)}
        texts |= {phrase.anchored for concept in request.erase for phrase in concept.phrases(config.templates)}
        with Meter() as meter:
            meter.see(model.parameters().values())
            base = meter.now
            rows, reading = counted(meter, lambda: request_rows(model, request, config.templates, config.tokens))
        solves = {}
        for key, (erased, kept) in rows.items():
            own = [layer.whole for layer in layers if layer.reads == key]
            solves[key] = Solve(len(erased.own), len(kept), erased.own.shape[1], len(own), sum(map(_bytes, own)))
        return ClosedFormPlan(base, len(texts), reading, solves)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
