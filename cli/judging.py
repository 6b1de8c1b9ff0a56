"""Options of every command that has a detector judge images, and opening it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from sublimate.pipelines.detector import Detector

Labels = Annotated[
    Path | None,
    typer.Option(help="Of a CLIP or SigLIP as --detector: a text file with what it tells apart, one label a line."),
]
Threshold = Annotated[
    float | None,
    typer.Option(help="Of a --detector other than ink: between 0 and 1, how sure it must be of a label."),
]
DetectorRevision = Annotated[str | None, typer.Option(help="As --revision, of a --detector's hub id.")]


def detector_as_asked(
    source: str,
    labels: Path | None,
    threshold: float | None,
    revision: str | None,
    *,
    group: str | None = None,
    device: str | torch.device,
) -> Detector:
    """The detector that a command was told to open.

    Args:
        source: as `open_detector` takes it.
        labels: a file of labels.
        threshold: see `open_detector`.
        revision: of a hub id.
        group: what the group of these labels is called; "class", as that of classifiers, unless given.
        device: where it computes.

    Raises:
        ValueError: for an option that the detector has no use for, and labels that are missing or doubled.
    """
    from sublimate.evaluation.detectors import open_detector

    named = None if labels is None else {group or "class": read_labels(labels)}
    return open_detector(source, labels=named, threshold=threshold, revision=revision, device=device)


def read_labels(path: Path) -> list[str]:
    """The labels of a text file, one a line; empty lines are none.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds none, or one twice.
    """
    labels = [line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not labels:
        raise ValueError(f"{path} holds no labels: write one a line.")
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"{path} holds {twice[0]!r} twice: labels exclude each other.")
    return labels
