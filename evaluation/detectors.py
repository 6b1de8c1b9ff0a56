"""Detectors to judge images with: Ink's own, any Hugging Face image classifier, and zero-shot CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sublimate.evaluation.encoders import directions, text_directions
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.preprocessing import Preprocessing
from sublimate.training.ink.detector import InkDetector

INK_ASSET = "ink_detector.safetensors"
NOTHING = ("a blank image", "random noise", "an abstract pattern", "a blurry, broken image")
"""Prompts that stand for "none of them" where a zero-shot detector is given no others."""

Labels = Mapping[str, Sequence[str] | Mapping[str, str]]
"""Group -> labels, or group -> {label: the prompt that describes it}."""


def with_reject(probabilities: Tensor, threshold: float) -> Tensor:
    """Gives the last column, "none of them", an extra weight of `threshold`, and normalises again; gradients pass.

    Where that column was empty, it is the largest afterwards exactly where no label reaches the threshold.

    Args:
        probabilities: (B, L + 1), rows sum to one.
        threshold: in [0, 1).

    Returns:
        (B, L + 1), rows sum to one.
    """
    labels, reject = probabilities[:, :-1], probabilities[:, -1:]
    return torch.cat([labels, reject + threshold], dim=1) / (1 + threshold)


class ImageClassifier(nn.Module):
    """An image classifier as a detector with one group.

    A classifier without a class for "nothing" must answer something even to noise, so an image counts as none of the
    labels where the largest softmax probability is below `threshold`.

    Args:
        model: a `transformers` image classifier, moved to eval mode and frozen.
        preprocessing: from images in [0, 1] to its pixel values.
        threshold: smallest probability that counts as recognition, in (0, 1).
        group: the name of the group of all its labels.

    Raises:
        ValueError: for a threshold outside (0, 1), or a model whose labels do not exclude each other.
    """

    def __init__(
        self, model: PreTrainedModel, preprocessing: Preprocessing, *, threshold: float = 0.5, group: str = "class"
    ) -> None:
        super().__init__()
        _check_threshold(threshold)
        if model.config.problem_type == "multi_label_classification":
            raise ValueError("this classifier's labels do not exclude each other; a detector's group must")
        self.model = model.requires_grad_(False).eval()
        self.preprocessing = preprocessing
        self.threshold = threshold
        self.groups: Mapping[str, tuple[str, ...]] = {group: _unique(model.config.id2label or {})}
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Probabilities (B, labels + 1) of images (B, 3, H, W) in [0, 1]; differentiable."""
        logits = self.model(pixel_values=self.preprocessing(images)).logits
        (group,) = self.groups
        return {group: with_reject(pad(logits.softmax(dim=-1), (0, 1)), self.threshold)}

    def features(self, images: Tensor) -> Tensor:
        """The last hidden state averaged over positions, (B, D), for FID and drift."""
        hidden = self.model(pixel_values=self.preprocessing(images), output_hidden_states=True).hidden_states[-1]
        return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.flatten(2).mean(dim=2)


class ZeroShotDetector(nn.Module):
    """CLIP (or SigLIP) as a detector: an image shows the label whose prompt it is closest to.

    Within a group the labels compete with prompts that describe nothing; the share of those is "none of them". A
    threshold above zero is added to that share, so that an image also counts as none of them where the best label is
    not that much ahead.

    Args:
        model: a `transformers` model with image and text embeddings, moved to eval mode and frozen.
        tokenizer: its tokenizer.
        preprocessing: from images in [0, 1] to its pixel values.
        labels: what to tell apart; a list of labels is described as "a photo of a {label}".
        nothing: prompts for "none of them", at least one.
        threshold: in [0, 1).

    Raises:
        ValueError: without labels or `nothing`, for a threshold outside [0, 1), or a prompt that is too long.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        preprocessing: Preprocessing,
        labels: Labels,
        *,
        nothing: Sequence[str] = NOTHING,
        threshold: float = 0.0,
    ) -> None:
        super().__init__()
        if threshold:
            _check_threshold(threshold)
        if not nothing or not labels or not all(labels.values()):
            raise ValueError("a zero-shot detector needs labels in every group and a prompt for none of them")
        self.model = model.requires_grad_(False).eval()
        self.preprocessing = preprocessing
        self.threshold = threshold
        described = {group: _described(names) for group, names in labels.items()}
        self.groups: Mapping[str, tuple[str, ...]] = {group: tuple(names) for group, names in described.items()}
        # One table of prompts for all groups: the labels' in order, then those for nothing.
        prompts = [prompt for names in described.values() for prompt in names.values()]
        self.texts: Tensor
        self.register_buffer("texts", self._embed([*prompts, *nothing], tokenizer), persistent=False)
        self.eval()

    @torch.no_grad()
    def _embed(self, prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
        limit = self.model.config.text_config.max_position_embeddings
        for prompt in prompts:
            length = len(tokenizer(prompt)["input_ids"])
            if length > limit:
                raise ValueError(f"the prompt {prompt!r} has {length} tokens and this model reads {limit}; shorten it")
        return text_directions(self.model, tokenizer, prompts)

    def features(self, images: Tensor) -> Tensor:
        """Image embeddings of unit length, (B, D), for FID and drift."""
        return directions(self.model.get_image_features(pixel_values=self.preprocessing(images)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Per group, probabilities (B, labels + 1) of images (B, 3, H, W) in [0, 1]; differentiable."""
        logits = self.model.logit_scale.exp() * self.features(images) @ self.texts.T
        counts = [len(labels) for labels in self.groups.values()]
        *by_group, nothing = logits.split([*counts, logits.shape[1] - sum(counts)], dim=1)
        found = {}
        for group, own in zip(self.groups, by_group, strict=True):
            shares = torch.cat([own, nothing.logsumexp(dim=1, keepdim=True)], dim=1).softmax(dim=1)
            found[group] = with_reject(shares, self.threshold)
        return found


def open_detector(
    source: str,
    *,
    labels: Labels | None = None,
    threshold: float | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> Detector:
    """Opens a detector by name.

    Args:
        source: "ink" for the packaged one, or a folder or hub id of an image classifier or a CLIP-like model.
        labels: what a CLIP-like model shall tell apart; only those need it.
        threshold: see `ImageClassifier` (0.5 unless given) and `ZeroShotDetector` (0 unless given).
        revision: of a hub id.
        device: where it computes; images must be there too.

    Returns:
        A frozen detector in eval mode.

    Raises:
        ValueError: for an option the detector has no use for, or a CLIP-like model without labels.
    """
    if source == "ink":
        for name, value in (("labels", labels), ("threshold", threshold), ("revision", revision)):
            if value is not None:
                raise ValueError(f"Ink's detector is fixed and takes no {name}: leave that out.")
        with as_file(files("sublimate.assets") / INK_ASSET) as path:
            return InkDetector.load(path).to(device)
    config = AutoConfig.from_pretrained(source, revision=revision)
    preprocessing = Preprocessing.of(AutoImageProcessor.from_pretrained(source, revision=revision))
    given: dict[str, Any] = {} if threshold is None else {"threshold": threshold}
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        if labels is None:
            raise ValueError(f"{source} matches images with texts; say which labels it shall tell apart")
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        model = AutoModel.from_pretrained(source, revision=revision, dtype=torch.float32)
        return ZeroShotDetector(model, tokenizer, preprocessing, labels, **given).to(device)
    if labels is not None:
        raise ValueError(f"{source} is a classifier with labels of its own; leave labels out")
    classifier = AutoModelForImageClassification.from_pretrained(source, revision=revision, dtype=torch.float32)
    return ImageClassifier(classifier, preprocessing, **given).to(device)


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold!r}; give a probability between 0 and 1")


def _described(labels: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    return dict(labels) if isinstance(labels, Mapping) else {label: f"a photo of a {label}" for label in labels}


def _unique(id2label: Mapping[Any, str]) -> tuple[str, ...]:
    """Labels in order; those that occur twice (ImageNet has two cranes) get their number."""
    names = [id2label[index] for index in range(len(id2label))]
    return tuple(name if names.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(names))
