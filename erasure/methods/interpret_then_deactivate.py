"""Interpret-then-Deactivate: switches off a concept's features in a sparse autoencoder inside the text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sublimate.erasure.eraser import Changes, Eraser
from sublimate.erasure.fine_tuning import RunConfig, fine_tune
from sublimate.erasure.request import Request, Templates
from sublimate.erasure.sparse_features import contrasted, lowest_change, peaks
from sublimate.pipelines.attached.deactivated_features import DeactivatedFeatures, Gate, residual_blocks
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.edit_attachment import EditAttachment
from sublimate.pipelines.model import Model
from sublimate.pipelines.sparse_autoencoder import SparseAutoencoder
from sublimate.training.data import read_prompts
from sublimate.training.ink.sources import captioned
from sublimate.training.sparse_autoencoder import SparseAutoencoderConfig, SparseAutoencoding, StatesSource
from sublimate.training.together import accelerator

_CAPTIONS = 4096


class InterpretThenDeactivateConfig(RunConfig):
    """Options of Interpret-then-Deactivate.

    Attributes:
        autoencoder: its size and training; see `SparseAutoencoderConfig`.
        block: which block's output, counted from 0; None takes the depth of the authors' eighth of CLIP's twelve.
        templates: prompts with `{}` that concepts, erased and preserved, are put in; `Concept.prompts` are used too.
        prompts: generic prompts beside them: "ink" for captions of Ink's grammar, a text or JSON-lines file, or None.
            Without any the autoencoder knows the request's prompts alone.
        retained: how many generic prompts, of those that name no erased concept, are left alone as preserved concepts
            are; the authors' number for nudity.
        features: K', the strongest features of each concept, erased or preserved, and of each generic prompt; the
            authors take 128 for persons and nudity, 256 for styles.
        tau: what a concept's features are multiplied by; 0 switches them off, as in the paper's text. The authors'
            code turns them around, with -8 for persons and -6 for styles.
        gate: a prompt's change is that of its most changed token, as for persons, or the mean, as for styles.
        margin: share of the smallest change of a prompt for the concept at which the gate opens.

    The others are `RunConfig`'s; batches are of the authors' 50 prompts.
    """

    autoencoder: SparseAutoencoderConfig = SparseAutoencoderConfig()
    block: int | None = Field(default=None, ge=0)
    templates: Templates = ("{}",)
    prompts: str | None = None
    retained: int = Field(default=50, ge=0)
    features: int = Field(default=128, ge=1)
    tau: float = Field(default=0.0, lt=1)
    gate: Gate = "max"
    margin: float = Field(default=0.99, gt=0, le=1)
    max_train_steps: int = Field(default=6000, ge=1)
    train_batch_size: int = Field(default=50, ge=1)


class InterpretThenDeactivate(Eraser):
    """Interpret-then-Deactivate (2025): z_F <- tau z_F for a concept's features F, in prompts that show it.

    A sparse autoencoder e ~ W_dec z + b_pre is trained on the outputs e of one block of the text encoder. F are the
    strongest features of the erased concepts that are among the strongest of nothing to leave alone: a preserved
    concept, a generic prompt, the empty one. Where |W_dec (z' - z)|^2 reaches `margin` times its smallest value over
    the concept's prompts, the rest of the encoder reads W_dec z' + b_pre; every other prompt keeps its e, and so its
    images, bit by bit.

    No weight changes: the edit is an attachment, which acts only where this library runs it, and whoever takes it off
    has the concept back. Name synonyms: a prompt that means the concept by another word is one to leave alone.

    The authors' gate compares e' with e, and so opens for prompts that the autoencoder merely reconstructs badly; here
    it compares with the reconstruction. Prompts are padded as the model pads them, in training and selection too.
    """

    Config = InterpretThenDeactivateConfig
    paper: ClassVar[str] = "2503.09446"
    uses_anchor = False
    attaches = True

    def solve(
        self, model: Model, request: Request, *, seed: int, detector: Detector | None, progress: bool
    ) -> Changes:
        config, home = self.config, model.device
        component, block, names = _place(model, config.block)
        generic = _generic(config)
        erased = [[phrase.text for phrase in c.phrases(config.templates)] for c in request.erase]
        preserved = [[phrase.text for phrase in c.phrases(config.templates)] for c in request.preserve]
        groups = [group for group in (_flat(erased), _flat(preserved), generic) if group]
        model.to(accelerator().device)
        try:
            source = StatesSource(model, component, names[block], groups)
            objective = SparseAutoencoding(source, config.autoencoder, seed=seed)
            fine_tune(model, objective, request, config, seed=seed, progress=progress, source=source, prompts=generic)
            autoencoder = objective.autoencoder.requires_grad_(False).eval()
            others = [text for text in generic if not any(c.named_in(text) for c in request.erase)]
            kept = [[""], *preserved, *([text] for text in others[: config.retained])]
            scale, threshold = self._deactivation(source, autoencoder, erased, kept)
        finally:
            model.to(home)
        options = {"component": component, "block": block, "k": autoencoder.k, "gate": config.gate}
        tensors = {**autoencoder.state_dict(), "scale": scale}
        kind = DeactivatedFeatures.__module__.rpartition(".")[2]
        return Changes(attachment=EditAttachment(kind, {**options, "threshold": threshold}, tensors))

    def _deactivation(
        self, source: StatesSource, autoencoder: SparseAutoencoder, erased: list[list[str]], kept: list[list[str]]
    ) -> tuple[Tensor, float]:
        """What each latent is multiplied by, and the gate's threshold."""
        config: InterpretThenDeactivateConfig = self.config
        concepts, retained = ([peaks(source, autoencoder, texts) for texts in groups] for groups in (erased, kept))
        chosen = contrasted(concepts, retained, config.features)
        scale = torch.where(chosen, config.tau, 1.0)
        features = DeactivatedFeatures(autoencoder, scale, 0.0, config.gate)
        lowest = lowest_change(source, features, _flat(erased))
        if lowest == 0:
            raise ValueError(
                "Every feature of what is erased is one of what is left alone too: preserve or retain less, lower "
                "features, or train a larger autoencoder for longer."
            )
        return scale, config.margin * lowest


def _place(model: Model, block: int | None) -> tuple[str, int, list[str]]:
    """The text encoder, the block's number, and the names of all its blocks.

    Raises:
        ValueError: for a model with other text encoders than one of CLIP's, or without that block.
    """
    components = [name for name in model.backbone.text_components if name in model.components()]
    names = residual_blocks(model.component(components[0])) if len(components) == 1 else []
    if not names:
        what = ", ".join(components) or "none"
        raise ValueError(
            f"Interpret-then-Deactivate works in a single text encoder of CLIP, as Stable Diffusion 1 and 2 have; "
            f"{model.source} has {what}: use another method."
        )
    chosen = max(0, len(names) * 3 // 4 - 1) if block is None else block
    if chosen >= len(names):
        raise ValueError(f"The text encoder of {model.source} has {len(names)} blocks, none of number {chosen}.")
    return components[0], chosen, names


def _flat(groups: list[list[str]]) -> list[str]:
    return [text for group in groups for text in group]


def _generic(config: InterpretThenDeactivateConfig) -> list[str]:
    if config.prompts is None:
        return []
    if config.prompts == "ink":
        return captioned(_CAPTIONS, 0, render=False)[0]
    return read_prompts(Path(config.prompts))
