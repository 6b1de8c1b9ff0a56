"""Eraser: what every method of concept erasure is to its caller, and what it writes into its edits."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sublimate.erasure.request import Request
from sublimate.pipelines.cards import public_name, public_values
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.edit import Edit
from sublimate.pipelines.edit_attachment import EditAttachment
from sublimate.pipelines.lora_sources import public_lora
from sublimate.pipelines.model import Model
from sublimate.pipelines.placement import name_of
from sublimate.pipelines.versions import versions
from sublimate.training.method import Method

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Changes:
    """What a method computed: new values and low-rank changes by full parameter key, an attachment, as in `Edit`.

    `outcome` holds JSON values that a method has to say of how it got there, for the edit's provenance.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    low_rank: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    attachment: EditAttachment | None = None
    outcome: Mapping[str, Any] = field(default_factory=dict)


class Costs(Protocol):
    """What an erasure will need, counted before it starts."""

    def lines(self) -> list[str]:
        """The count as text, a line for each part."""
        ...


class NotCounted(ValueError):
    """What an eraser will need cannot be known from shapes alone."""


class Eraser(Method):
    """A method of concept erasure: options in, an edit of a model out.

    A method refuses parts of a request that would change *what* is erased and that it cannot honour (`within`,
    pictures, a detector), and warns of an anchor that it does not read. `uses_anchor`, `uses_images` and
    `uses_kept_images` say whether it reads what takes a concept's place, pictures of it and pictures of what is
    preserved, `attaches` that its edits carry an attachment, which stock diffusers cannot hold, `low_rank` that they
    are low-rank changes alone, which LoRA files can hold. An eraser made of another has the other's answers.
    """

    handles_within: bool = False
    uses_detector: bool = False
    uses_anchor: bool = True
    uses_images: bool = False
    uses_kept_images: bool = False
    attaches: bool = False
    low_rank: bool = False

    def fit(
        self,
        model: Model,
        request: Request,
        *,
        seed: int = 0,
        detector: Detector | None = None,
        progress: bool = False,
    ) -> Edit:
        """The edit that carries out the request; the model stays as it is, bit by bit.

        Args:
            model: what to erase from, with the edits it carries.
            request: what to erase and what to leave alone.
            seed: all randomness derives from it.
            detector: judges images, for methods that consult one.
            progress: show a progress bar where the method takes long.

        Raises:
            ValueError: when the method cannot do what is asked, or the model's family does not fit it.
        """
        self.check(request)
        if detector is not None and not self.uses_detector:
            raise ValueError(f"{self.name()} does not consult a detector: leave it out.")
        provenance = {
            "base": {
                "source": public_name(model.source),
                "content_hash": model.content_hash(),
                **({} if model.dtype == torch.float32 else {"dtype": name_of(model.dtype)}),
                **({"loras": [public_lora(lora) for lora in model.loras]} if model.loras else {}),
            },
            "method": self.name(),
            "paper": self.paper,
            "config": public_values(self.config.model_dump(mode="json")),
            "request": request.to_dict(paths=False),
            "seed": seed,
            "versions": versions(),
        }
        changes = self.solve(model, request, seed=seed, detector=detector, progress=progress)
        provenance["artefact"] = "weights" if changes.attachment is None else "attachment"
        if changes.outcome:
            provenance["outcome"] = dict(changes.outcome)
        return Edit(changes.values, changes.low_rank, provenance, changes.attachment)

    def check(self, request: Request) -> None:
        """Refuses a request that asks for what the method cannot do, and warns of anchors that it does not read.

        Raises:
            ValueError: for `within` or pictures, unless the method handles them.
        """
        if request.within is not None and not self.handles_within:
            raise ValueError(f"{self.name()} cannot erase within {request.within.name!r} only: use another method.")
        for concepts, read in ((request.erase, self.uses_images), (request.preserve, self.uses_kept_images)):
            if pictured := [concept.name for concept in concepts if concept.images and not read]:
                raise ValueError(f"{self.name()} learns from no pictures of {pictured[0]!r}: leave out its images.")
        inside = () if request.within is None else (request.within,)
        if pictured := [concept.name for concept in inside if concept.images]:
            raise ValueError(f"{self.name()} reads no pictures of {pictured[0]!r}: leave out its images.")
        erased = () if self.uses_anchor else request.erase
        if anchored := [concept for concept in (*erased, *inside, *request.preserve) if concept.anchor]:
            log.warning("%s reads no anchor of %r: it has no effect.", self.name(), anchored[0].name)

    def plan(self, model: Model, request: Request) -> Costs:
        """What `fit` will need, without fitting.

        Args:
            model: opened by `open_shapes`, so without weights; it is left as no other use would have it.
            request: as `fit` is given it.

        Raises:
            NotCounted: when what the method does depends on values, which shapes do not have.
            ValueError: as `fit`.
        """
        raise self.not_counted()

    def not_counted(self) -> NotCounted:
        """Says that the method's course depends on values."""
        return NotCounted(f"what {self.name()} does depends on values, of which a dry run reads none.")

    @abstractmethod
    def solve(
        self, model: Model, request: Request, *, seed: int, detector: Detector | None, progress: bool
    ) -> Changes:
        """What `fit` puts into its edit; must leave the model as it is."""
