"""Pictures and prompts in one space: a pair of towers whose text tower is the model's own text encoder."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, CLIPModel

from sublimate.diffusion.conditions import Condition
from sublimate.erasure.text_student import text_encoders
from sublimate.pipelines.model import Model
from sublimate.pipelines.preprocessing import Preprocessing
from sublimate.training.randomness import key


class Pair(nn.Module, ABC):
    """Embeds latents and pooled states of text side by side, as directions; frozen once made."""

    @abstractmethod
    def images(self, latents: Tensor) -> Tensor:
        """x0 (batch, *latent_shape) -> directions (batch, d)."""

    @abstractmethod
    def texts(self, pooled: Tensor) -> Tensor:
        """Pooled states (batch, width), as `pooled` gives them -> directions (batch, d); differentiable."""

    @property
    @abstractmethod
    def scale(self) -> Tensor:
        """What multiplies cosines to make logits."""


def pooled(model: Model, condition: Condition, prompts: Sequence[str]) -> Tensor:
    """One state per prompt, (batch, width): the condition's own pooled states, else that of the end token."""
    if "text.pooled" in condition:
        return condition["text.pooled"]
    ends = [model.prompt_rows(prompt)[0].end for prompt in prompts]
    return condition["text"][torch.arange(len(ends)), torch.tensor(ends)]


def info_nce(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy in which every picture looks for its text, and every text for its picture.

    Args:
        images, texts: directions, (rounds, n, d); in a round picture i belongs to text i, and to no other.
        scale: of the cosines.

    Returns:
        a mean over rounds and pairs, a scalar.
    """
    logits = scale * images @ texts.mT
    own = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
    return (F.cross_entropy(logits.mT, own) + F.cross_entropy(logits, own)) / 2


class CLIPPair(Pair):
    """A CLIP checkpoint whose text tower the model reads with, as Stable Diffusion 1.x reads with ViT-L/14.

    Args:
        model: whose decoder makes pictures of latents.
        source: the checkpoint, a folder or hub id.

    Raises:
        ValueError: when it is another CLIP than the model's, or the model has several.
    """

    def __init__(self, model: Model, source: str) -> None:
        super().__init__()
        clip: Any = CLIPModel.from_pretrained(source, dtype=torch.float32)
        encoders = list(text_encoders(model).values())
        ours, theirs = (
            {k.replace("text_model.", ""): p for k, p in m.named_parameters()} for m in (encoders[0], clip)
        )
        name = "embeddings.token_embedding.weight"
        same_depth = encoders[0].config.num_hidden_layers == clip.config.text_config.num_hidden_layers
        if len(encoders) > 1 or not same_depth or not _alike(ours[name], theirs.get(name)):
            raise ValueError(f"{source} is not the one CLIP that {model.source} reads with: leave clip out.")
        self.clip = clip.to(model.device).requires_grad_(False).eval()
        self.preprocessing = Preprocessing.of(AutoImageProcessor.from_pretrained(source))
        self._decode = model.render

    def images(self, latents: Tensor) -> Tensor:
        embedding = self.clip.get_image_features(pixel_values=self.preprocessing(self._decode(latents)))
        return F.normalize(getattr(embedding, "pooler_output", embedding), dim=-1)

    def texts(self, pooled: Tensor) -> Tensor:
        return F.normalize(self.clip.text_projection(pooled), dim=-1)

    @property
    def scale(self) -> Tensor:
        return self.clip.logit_scale.exp()


def _alike(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and torch.allclose(a.cpu(), b.cpu(), atol=1e-3)


class TrainedPair(Pair):
    """A small network over latents and a projection of pooled states, for models whose CLIP has no pictures' tower.

    Args:
        channels: of the latents.
        width: of pooled states.
        dim: of the common space.
    """

    def __init__(self, channels: int, width: int, dim: int = 64) -> None:
        super().__init__()
        sizes = (channels, 32, 64, 64)
        stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, stride=1 + (i == 1)), nn.GroupNorm(8, b), nn.SiLU())
            for i, (a, b) in enumerate(itertools.pairwise(sizes))
        ]
        # Places are kept: a mean over them would forget where a stroke was.
        self.tower = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * sizes[-1], dim))
        self.projection = nn.Linear(width, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def images(self, latents: Tensor) -> Tensor:
        return F.normalize(self.tower(latents), dim=-1)

    def texts(self, pooled: Tensor) -> Tensor:
        return F.normalize(self.projection(pooled), dim=-1)

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()


def trained_pair(
    pictures: Sequence[Sequence[Tensor]],
    texts: Sequence[Tensor],
    *,
    steps: int,
    seed: int,
    rounds: int = 8,
    learning_rate: float = 2e-3,
) -> TrainedPair:
    """Trains a pair by InfoNCE against text states that stay as they are.

    A round holds one pair of each concept, so that no picture's text is taken for another's.

    Args:
        pictures: per concept and phrase, latents (count, *latent_shape).
        texts: per concept, the pooled states of its phrases (phrases, width); on the device where to train.
        steps: of Adam.
        seed: of the initial weights and of what is drawn.
        rounds: per step.
        learning_rate: of Adam.

    Returns:
        The pair, frozen, where the texts are.
    """
    device, generator = texts[0].device, torch.Generator().manual_seed(key(seed, "pair"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "pair weights"))
        pair = TrainedPair(pictures[0][0].shape[1], texts[0].shape[1])
    pair.to(device)
    optimiser = torch.optim.Adam(pair.parameters(), lr=learning_rate)

    def drawn(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    for _ in range(steps):
        shown, told = [], []
        for _ in range(rounds):
            for own, states in zip(pictures, texts, strict=True):
                phrase = drawn(len(states))
                shown.append(own[phrase][drawn(len(own[phrase]))])
                told.append(states[phrase])
        images, said = pair.images(torch.stack(shown).to(device)), pair.texts(torch.stack(told))
        shape = (rounds, len(pictures), -1)
        optimiser.zero_grad()
        info_nce(images.view(shape), said.view(shape), pair.scale).backward()
        optimiser.step()
    return pair.requires_grad_(False).eval()
