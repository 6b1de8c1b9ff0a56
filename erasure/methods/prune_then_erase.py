"""Prune, then erase: sets the smallest weights to zero, and lets another eraser work on what is left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor, nn

from sublimate.erasure.eraser import Changes, Eraser
from sublimate.erasure.fine_tuning import FineTuningEraser
from sublimate.erasure.request import Request
from sublimate.erasure.saliency import largest
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.edit import Edit
from sublimate.pipelines.model import Model
from sublimate.training import registry
from sublimate.training.config import Config, validate_section

ERASERS = "sublimate.erasure.methods"


class PruneThenEraseConfig(Config):
    """Options of pruning before erasing.

    Attributes:
        then: the eraser that follows, by name.
        options: its options.
        sparsity: share of the denoiser's weights that become zero: the smallest of all linear and convolutional layers
            together. The paper's 95 % are for classifiers; a generator bears far less.
    """

    then: str
    options: dict[str, Any] = Field(default_factory=dict)
    sparsity: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _in_full(cls, data: Any) -> Any:
        """Has all the options of the eraser that follows, for the edit's provenance."""
        if not isinstance(data, Mapping) or not isinstance(data.get("then"), str):
            return data
        found = validate_section(_eraser(data["then"]).Config, data.get("options", {}), "options")
        return {**data, "options": found.model_dump(mode="json")}


class PruneThenErase(Eraser):
    """Model sparsity before unlearning (Jia et al. 2023): theta becomes m * theta, then any eraser edits that.

    m keeps the largest |theta|, found once and over all layers together (one-shot magnitude pruning). The eraser is
    fitted on a model that carries the pruning; the edit holds both.

    A fine-tuning eraser leaves every zero a zero: masked gradients are 0 from its first step on, as are Adam's
    moments, and nothing decays. A closed form solves for whole matrices, so the layers that it edits are dense again,
    and zeros stay in all others.
    """

    Config = PruneThenEraseConfig
    paper: ClassVar[str] = "2304.04934"

    def __init__(self, config: PruneThenEraseConfig | None = None, /, **options: Any) -> None:
        super().__init__(config, **options)
        kind = _eraser(self.config.then)
        self.inner = kind(kind.Config(**self.config.options))
        self.handles_within, self.uses_detector = self.inner.handles_within, self.inner.uses_detector
        self.uses_anchor, self.uses_images = self.inner.uses_anchor, self.inner.uses_images
        self.uses_kept_images = self.inner.uses_kept_images
        self.attaches = self.inner.attaches
        if self.config.sparsity > 0 and getattr(self.inner.config, "lora_rank", None) is not None:
            raise ValueError("Pruned weights are single ones, and a LoRA moves whole layers: leave out lora_rank.")

    def solve(
        self, model: Model, request: Request, *, seed: int, detector: Detector | None, progress: bool
    ) -> Changes:
        masks = magnitude_masks(model, self.config.sparsity)
        if not masks:
            return self.inner.solve(model, request, seed=seed, detector=detector, progress=progress)
        parameters = model.parameters()
        pruned = Edit({key: parameters[key] * mask for key, mask in masks.items()})
        with pruned.applied(model, allow_other_base=True):
            if isinstance(self.inner, FineTuningEraser):
                changes = self.inner.train(model, request, seed=seed, progress=progress, masks=masks)
            else:
                changes = self.inner.solve(model, request, seed=seed, detector=detector, progress=progress)
        whole = Edit.compose([pruned, Edit(changes.values, changes.low_rank, attachment=changes.attachment)])
        return Changes(whole.values, whole.low_rank, whole.attachment, changes.outcome)


def magnitude_masks(model: Model, sparsity: float) -> dict[str, Tensor]:
    """Which weights of the denoiser's linear and convolutional layers are not among the smallest.

    Args:
        model: whose.
        sparsity: share that is, in [0, 1).

    Returns:
        bool by full parameter key, without layers that stay whole.
    """
    component = model.backbone.network_attribute
    layers = {
        f"{component}/{name}.weight": module.weight
        for name, module in model.component(component).named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    masks = largest({key: weight.detach().float().abs() for key, weight in layers.items()}, 1 - sparsity)
    return {key: mask for key, mask in masks.items() if not mask.all()}


def _eraser(name: str) -> type[Eraser]:
    """The eraser that follows.

    Raises:
        ValueError: when there is none of that name, or it is this one.
    """
    registry.check_name(ERASERS, name)
    if name == PruneThenErase.name():
        raise ValueError(f"{name} is followed by another eraser, not by itself: raise its sparsity instead.")
    return registry.load(ERASERS, name, Eraser)
