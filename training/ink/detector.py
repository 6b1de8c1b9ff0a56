"""Ink's detector: a small network that reads digit, ink and style off a picture and says when there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sublimate.training.ink.corruptions import IGNORED
from sublimate.training.ink.renderer import SIZE
from sublimate.training.ink.vocabulary import GROUPS

_KIND = "sublimate.ink.detector"


class InkDetector(nn.Module):
    """Reads Ink's three groups; each head has one more class than labels, last, for "none of them".

    Normalisation is by groups of channels: nothing changes between `train()` and `eval()`, and no picture's reading
    depends on its batch.

    Args:
        width: channels of the first stage; 32 makes 0.15 M parameters and 128 features.
    """

    groups: Mapping[str, tuple[str, ...]] = GROUPS

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        if width % 16:
            raise ValueError(f"The detector's width must be a multiple of 16, not {width}.")
        self.width = width
        self.feature_dim = 4 * width
        self.trunk = nn.Sequential(
            _stage(3, width, kernel=5, stride=2),
            _stage(width, width),
            _stage(width, 2 * width, stride=2),
            _stage(2 * width, 2 * width),
            _stage(2 * width, 4 * width, stride=2),
        )
        # Each channel has its own weights over the 4x4 places left: an average over them would forget where a stroke
        # was, and a full linear layer would be larger than the rest of the network.
        self.pool = nn.Conv2d(4 * width, 4 * width, SIZE // 8, groups=4 * width)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(self.feature_dim, len(labels) + 1) for name, labels in GROUPS.items()}
        )

    def features(self, images: Tensor) -> Tensor:
        """What the heads read, (B, feature_dim): the space Ink's FID, KID, precision and recall are measured in.

        Args:
            images: (B, 3, 32, 32) in [0, 1].

        Raises:
            ValueError: for pictures of another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(
                f"Ink's detector reads pictures (B, 3, {SIZE}, {SIZE}), not {tuple(images.shape)}: choose another."
            )
        return F.silu(self.pool(self.trunk(2 * images - 1)).flatten(1))

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Unnormalised log-probabilities per group, (B, labels + 1)."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Probabilities per group, (B, labels + 1), the last column for "none of them"; differentiable in `images`."""
        return {name: logits.softmax(dim=1) for name, logits in self.logits(images).items()}

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file whose header says what it is and which labels it reads."""
        groups = json.dumps({name: list(labels) for name, labels in self.groups.items()})
        metadata = {"format": "pt", "kind": _KIND, "width": str(self.width), "groups": groups}
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> InkDetector:
        """Reads what `save` wrote, ready to use: in eval mode, without gradients to its weights.

        Raises:
            ValueError: when the file holds something else, or a detector of other labels.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != _KIND:
                raise ValueError(f"{path} is not a detector of Ink: its header says {metadata.get('kind')!r}.")
            if json.loads(metadata["groups"]) != {name: list(labels) for name, labels in cls.groups.items()}:
                raise ValueError(f"{path} reads the labels {metadata['groups']}, not those of this version of Ink.")
            detector = cls(int(metadata["width"]))
            detector.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        return detector.requires_grad_(False).eval()


def detector_loss(logits: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy summed over the groups, each a mean over the pictures whose target says something.

    Args:
        logits: per group (B, labels + 1).
        targets: (B, 3) with the columns digit, ink, style: a label, the reject class (the number of labels), or
            `corruptions.IGNORED`.

    Raises:
        ValueError: when the targets do not have one column per group.
    """
    if targets.ndim != 2 or targets.shape[1] != len(GROUPS):
        raise ValueError(f"Targets have shape (B, {len(GROUPS)}), one column per group, not {tuple(targets.shape)}.")
    total = targets.new_zeros((), dtype=torch.float32)
    for name, target in zip(GROUPS, targets.unbind(dim=1), strict=True):
        summed = F.cross_entropy(logits[name].float(), target, ignore_index=IGNORED, reduction="sum")
        total = total + summed / (target != IGNORED).sum().clamp(min=1)
    return total


def worn(images: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
    """Pictures as a decoder gives them back: a little soft, a little noisy, a little off in contrast.

    The detector trains on these, so that it reads generated pictures as well as rendered ones.

    Args:
        images: (B, 3, 32, 32) in [0, 1].
        uniform: (B, 3) in [0, 1): amounts of blur (none to a 3x3 average), noise (standard deviation up to 0.08, none
            for a third of the pictures) and contrast (0.85 to 1.05).
        normal: standard normal numbers shaped like `images`.

    Returns:
        Pictures in [0, 1].
    """
    blur, noise, contrast = (amount[:, None, None, None].to(images.dtype) for amount in uniform.unbind(dim=1))
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images + blur * (soft - images)
    return (images * (0.85 + 0.2 * contrast) + 0.08 * (1.5 * noise - 0.5).clamp(min=0) * normal).clamp(0, 1)


def _stage(channels: int, out: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(out // 8, out), nn.SiLU())
