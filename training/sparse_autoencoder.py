"""Training a top-k sparse autoencoder on the states of a text encoder's block, as an objective of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast

import torch
from pydantic import Field
from torch import Tensor

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.features import tapped
from sublimate.pipelines.model import Model
from sublimate.pipelines.sparse_autoencoder import SparseAutoencoder, largest
from sublimate.training.data import Source
from sublimate.training.objective import Artefact, Batch, Loss, ObjectiveConfig, SoloObjective, Turn
from sublimate.training.players import Player, PlayerConfig
from sublimate.training.randomness import SampleRandom, key

_STARTING_PROMPTS = 512


class SparseAutoencoderConfig(ObjectiveConfig):
    """Options of a sparse autoencoder and its training; where not said otherwise those of Interpret-then-Deactivate.

    Attributes:
        expansion: latents per dimension of a state. The authors' 2^19 latents for CLIP's 768 dimensions are 683: more
            weights than Stable Diffusion's UNet has, and codes of gigabytes per batch.
        k: latents that a state may use.
        aux_k: dead latents that learn what the others leave over.
        aux_weight: of that term.
        dead_after: training steps without use after which a latent is dead; not known of the authors.
        learning_rate: of Adam, without weight decay.
    """

    expansion: int = Field(default=32, ge=1)
    k: int = Field(default=64, ge=1)
    aux_k: int = Field(default=256, ge=1)
    aux_weight: float = Field(default=1 / 32, ge=0)
    dead_after: int = Field(default=100, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)

    def passes(self, step: int = 0) -> float:
        """Through the text encoder, and through the autoencoder: whose latents are used, and the update."""
        return 1 + 1 + 3


class States(Source, Protocol):
    """Where an autoencoder's states come from: what is drawn, and what its states are.

    `model` is what they are states of, None for a plain table.
    """

    model: Any

    def drawn(self, random: SampleRandom) -> Any: ...

    def states(self, drawn: Any) -> Tensor: ...


class StatesSource:
    """States of a block of a text encoder, drawn by prompt; the first token, the same for every prompt, is left out.

    Args:
        model: the text encoder's; it and the edits that the model carries stay as they are.
        component: the text encoder's name.
        block: its block's, as in `named_modules`.
        groups: prompts in groups, none empty; a draw picks a group, then one of its prompts, with equal chances.
    """

    provides: frozenset[str] = frozenset({"activations"})

    def __init__(self, model: Model, component: str, block: str, groups: Sequence[Sequence[str]]) -> None:
        self.model, self.component, self.block = model, component, block
        self.groups = [list(group) for group in groups]

    @torch.no_grad()
    def states(self, prompts: Sequence[str]) -> Tensor:
        """float32 (prompts, tokens - 1, width)."""
        with tapped(self.model.component(self.component), [self.block]) as taps:
            self.model.encode_prompts(prompts)
        return taps[self.block][:, 1:].float()

    def drawn(self, random: SampleRandom) -> list[str]:
        """One prompt per sample."""
        chosen = [self.groups[i] for i in random.integers(len(self.groups)).tolist()]
        return [group[int(u * len(group))] for group, u in zip(chosen, random.uniform().tolist(), strict=True)]

    def batch(self, random: SampleRandom) -> Batch:
        return Batch(Condition(), random, {"activations": self.states(self.drawn(random))})


class SparseAutoencoding(SoloObjective):
    """E [|e - ê|^2 + aux_weight |sg[e - ê] - W_dec z_aux|^2] / V over all tokens e of the prompts.

    z_aux are the aux_k largest activations of dead latents, and V is the states' mean square distance from b_pre where
    training starts, so that a loss of 1 is what the bias alone would have. b_pre starts as the states' geometric
    median, W_enc as the transpose of W_dec, whose columns are random directions and keep their length of 1: gradients
    lose their part along a column, and what a step adds to its length is taken off again.

    Args:
        source: of the states; gives those that b_pre and V are made of.
        config: options.
        seed: of the directions.
    """

    Config = SparseAutoencoderConfig
    paper: ClassVar[str] = "2406.04093"
    config: SparseAutoencoderConfig

    def __init__(self, source: States, config: SparseAutoencoderConfig, *, seed: int = 0) -> None:
        first = source.states(source.drawn(SampleRandom(seed, 0, "bias", range(_STARTING_PROMPTS)))).flatten(0, 1)
        self.autoencoder = _initial(first, config, seed)
        options = PlayerConfig(learning_rate=config.learning_rate, adam_weight_decay=0.0)
        names = frozenset(name for name, _ in self.autoencoder.named_parameters())
        super().__init__(source.model, config, "autoencoder", Player(self.autoencoder, options, names))
        self.variance = (first - self.autoencoder.bias).square().sum(-1).mean().detach()
        self.idle = torch.zeros(len(self.autoencoder.decoder), device=first.device)
        self.used = torch.zeros_like(self.idle)
        decoder = self.autoencoder.decoder.requires_grad_(True)  # tensors without gradient take no hooks
        decoder.register_hook(lambda gradient: across(gradient, decoder.detach()))
        self.player.set_trainable(False)

    @property
    def needs(self) -> frozenset[str]:
        return StatesSource.provides

    def prepare(self, turn: Turn, batch: Batch, step: int) -> Batch:
        used = (self.autoencoder.encode(batch["activations"]) > 0).flatten(0, 1).any(0)
        self.used = self.mean_over_processes(used.float())
        # The first states may have been elsewhere than what trains.
        self.idle, self.variance = self.idle.to(used.device), self.variance.to(used.device)
        return batch

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        config, states = self.config, batch["activations"]
        activations = self.autoencoder.activations(states)
        left = states - self.autoencoder.decode(largest(activations, config.k))
        error = left.square().sum(-1).mean() / self.variance
        dead = self.idle >= config.dead_after
        count = min(config.aux_k, int(dead.sum()))
        auxiliary = torch.zeros_like(error)
        if count:
            codes = largest(activations.masked_fill(~dead, -torch.inf), count)
            auxiliary = (left.detach() - codes @ self.autoencoder.decoder).square().sum(-1).mean() / self.variance
        logs = {"unexplained": error, "dead": dead.float().mean()}
        return Loss(error + config.aux_weight * auxiliary, logs)

    def after_step(self, step: int) -> None:
        decoder = self.autoencoder.decoder
        with torch.no_grad():
            decoder.div_(decoder.norm(dim=1, keepdim=True))
        self.idle = torch.where(self.used > 0, 0.0, self.idle + 1)

    def state(self) -> dict[str, Tensor]:
        return {"idle": self.idle, "variance": self.variance}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.idle, self.variance = (state[name].to(self.idle.device) for name in ("idle", "variance"))

    def exports(self) -> Artefact:
        return Artefact("attachment", self.autoencoder)


def _initial(states: Tensor, config: SparseAutoencoderConfig, seed: int) -> SparseAutoencoder:
    width = states.shape[1]
    autoencoder = SparseAutoencoder(width, config.expansion * width, config.k)
    generator = torch.Generator().manual_seed(key(seed, "directions"))
    directions = torch.randn(autoencoder.decoder.shape, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    with torch.no_grad():
        for parameter, value in (
            (autoencoder.decoder, directions),
            (autoencoder.encoder, directions),
            (autoencoder.bias, geometric_median(states)),
        ):
            parameter.copy_(value)
    return cast(SparseAutoencoder, autoencoder.to(states.device))


def across(vectors: Tensor, directions: Tensor) -> Tensor:
    """Rows of `vectors` without their parts along the unit rows of `directions`, (n, width) both."""
    return vectors - (vectors * directions).sum(-1, keepdim=True) * directions


def geometric_median(points: Tensor, iterations: int = 100) -> Tensor:
    """The point with the smallest sum of distances to rows (n, width), by Weiszfeld's iteration from their mean."""
    points = points.double()
    median = points.mean(0)
    for _ in range(iterations):
        weights = 1 / (points - median).norm(dim=1, keepdim=True).clamp_min(1e-12)
        median = (weights * points).sum(0) / weights.sum()
    return median.float()
