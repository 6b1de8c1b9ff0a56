"""Receler: adapters after cross-attention learn to erase a concept that an adversary keeps asking for."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition
from sublimate.erasure import targets
from sublimate.erasure.concept_maps import concept_maps
from sublimate.erasure.eraser import Changes
from sublimate.erasure.fine_tuning import FineTuningEraser
from sublimate.erasure.request import Request
from sublimate.erasure.rollouts import RolloutConfig, RolloutObjective
from sublimate.pipelines.attached.erasing_adapters import adding, bottlenecks, cross_attentions, key_of
from sublimate.pipelines.edit_attachment import EditAttachment
from sublimate.pipelines.features import tapped
from sublimate.pipelines.model import Model
from sublimate.training.objective import Artefact, Batch, Loss, Turn
from sublimate.training.players import Player, PlayerConfig, shared_copy
from sublimate.training.randomness import key


class RecelerConfig(RolloutConfig):
    """Options of Receler; defaults are the authors', the retain term is this library's.

    Attributes:
        rank: of the adapters.
        eta: strength of the negative guidance, as in ESD.
        localise: weight of what the adapters say where the concept is not.
        threshold: of the stretched attention map, above which the concept is.
        adversary_rows: rows of text that the adversary writes, from the concept's end on.
        adversary_steps: its updates for each of the student's.
        adversary_rate: of its Adam, with weight decay as large.

    The others are `RolloutConfig`'s and `StudentConfig`'s.
    """

    learning_rate: float = Field(default=3e-4, gt=0)
    max_train_steps: int = Field(default=500, ge=1)
    rank: int = Field(default=128, ge=1)
    eta: float = Field(default=1.0, ge=0)
    localise: float = Field(default=0.1, ge=0)
    threshold: float = Field(default=0.1, ge=0, le=1)
    adversary_rows: int = Field(default=16, ge=1)
    adversary_steps: int = Field(default=50, ge=0)
    adversary_rate: float = Field(default=0.1, gt=0)

    def brief(self) -> Self:
        few = {"adversary_steps": min(1, self.adversary_steps)}
        return super().brief().model_copy(update=few)

    @property
    def update_passes(self) -> float:
        return 2 + 2 * self.adversary_steps + 3


class RecelerObjective(RolloutObjective):
    """E |y_A(x_t, c + a) - [y* - eta (y*_c - y*)]|^2 + localise mean_l |A_l (1 - M)|^2, a = argmin |y_A - y*_c|^2.

    * is the frozen network, A_l the answer of layer l's adapter, M where the frozen network looks for the concept.
    The adversary's rows a take the places after the concept's tokens. The authors keep them from update to update;
    here each sample starts from its own random rows, so that samples stay independent of each other.
    """

    Config = RecelerConfig
    paper: ClassVar[str] = "2311.17717"
    config: RecelerConfig

    def __init__(self, model: Model, config: RecelerConfig, request: Request, *, seed: int = 0) -> None:
        super().__init__(model, config, request, seed=seed)
        phrases = [phrase for concept in request.erase for phrase in concept.phrases(config.templates)]
        length = self.null["text"].shape[1]
        places = torch.arange(length)
        spans = [model.find_concept(phrase.text, phrase.name)[0] for phrase in phrases]
        self.own = torch.stack([(places >= span.start) & (places < span.stop) for span in spans])
        ends = [(span.stop, min(span.stop + config.adversary_rows, length)) for span in spans]
        self.free = torch.stack([(places >= start) & (places < stop) for start, stop in ends])

    def make_player(self, model: Model, config: RecelerConfig) -> Player:
        tree = shared_copy(model.denoiser)
        layers = cross_attentions(model.denoiser.network)
        if not layers:
            raise ValueError(f"{model.source} has no cross-attention to put adapters behind: use another method.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(self.seed, "adapters"))
            adapters = bottlenecks(model.denoiser.network, config.rank).to(model.device)
        tree.add_module("adapters", adapters)
        for name in layers:
            tree.get_submodule(f"network.{name}").register_forward_hook(adding(adapters[key_of(name)]))
        names = frozenset(f"adapters.{name}" for name, _ in adapters.named_parameters())
        return Player(tree, PlayerConfig(learning_rate=config.learning_rate, adam_weight_decay=0.0), names)

    def aim(self, batch: Batch) -> Batch:
        c, x_t, t, told = self.config, batch["x_t"], batch["t"], self.asked(batch)
        y_null = self.frozen(x_t, t, self.null.to(x_t.device))
        y_concept, maps = concept_maps(self.frozen, x_t, t, told, self.own[batch["rows"]].to(x_t.device))
        target = targets.negative_guidance(y_null, y_concept, c.eta)
        opened = self.opened(batch, told)
        text = self.attacked(batch, opened, y_concept.output) if c.adversary_steps else told["text"]
        return batch.adding(target=target.output, text=text, elsewhere=(maps < c.threshold).to(maps.dtype))

    def opened(self, batch: Batch, told: Condition) -> Condition:
        """The condition with the adversary's rows unmasked, where a network reads no padding."""
        if not self.config.adversary_steps or "text.mask" not in told:
            return told
        mask = told["text.mask"]
        return told.replace(**{"text.mask": mask.masked_fill(self.free[batch["rows"]].to(mask.device), 1)})

    def attacked(self, batch: Batch, told: Condition, y_concept: Tensor) -> Tensor:
        """Text in which the adversary's rows make the student draw the concept, (batch, length, width)."""
        c, text = self.config, told["text"]
        free = self.free[batch["rows"]].to(text.device)[..., None]
        # The authors' rows start uniform in [0, 1).
        u = torch.erf(batch.random.normal(text.shape[1:], text.device) / 2**0.5)
        rows = ((1 + u) / 2).to(text.dtype).requires_grad_(True)
        adam = torch.optim.Adam([rows], lr=c.adversary_rate, weight_decay=c.adversary_rate)
        for _ in range(c.adversary_steps):
            with torch.enable_grad():
                said = self.student(batch["x_t"], batch["t"], told.replace(text=torch.where(free, rows, text)))
                # A sum over samples: each has its own rows, and the size of the batch changes nothing.
                error = (said.output - y_concept).square().flatten(1).mean(1).sum()
            (rows.grad,) = torch.autograd.grad(error, [rows])
            adam.step()
        return torch.where(free, rows.detach(), text)

    def loss(self, turn: Turn, batch: Batch, step: int) -> Loss:
        c, layers = self.config, cross_attentions(self.student.network)
        told = self.opened(batch, self.asked(batch)).replace(text=batch["text"])
        with tapped(self.student, [f"adapters.{key_of(name)}" for name in layers]) as said:
            prediction = self.student(batch["x_t"], batch["t"], told)
        target = replace(prediction, output=batch["target"])
        terms = {"erase": (1.0, targets.squared_error(prediction, target, c.space).mean())}
        if c.localise > 0:
            outside = [outside_error(answer, batch["elsewhere"]) for answer in said.values()]
            terms["localise"] = c.localise, torch.stack(outside).mean()
        return self.weighed(batch, terms)

    def changes(self, model: Model) -> Changes:
        tensors = {name.removeprefix("adapters."): p.detach() for name, p in self.player.trainable().items()}
        return Changes(attachment=EditAttachment("erasing_adapters", {"rank": self.config.rank}, tensors))

    def exports(self) -> Artefact:
        return Artefact("attachment", self.student)


def outside_error(answer: Tensor, elsewhere: Tensor) -> Tensor:
    """The mean square of an adapter's answer over the places where the concept is not, averaged over samples.

    Args:
        answer: (batch, places, channels), row by row of the picture.
        elsewhere: (batch, 1, h, w), 1 where the concept is not, of any resolution with the picture's proportions.
    """
    shrink = (elsewhere.shape[2] * elsewhere.shape[3] / answer.shape[1]) ** 0.5
    size = (round(elsewhere.shape[2] / shrink), round(elsewhere.shape[3] / shrink))
    mask = nn.functional.interpolate(elsewhere, size).flatten(1)
    return ((answer.float().square().mean(-1) * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()


class Receler(FineTuningEraser):
    """Reliable and Efficient Concept Erasure with lightweight erasers (Huang et al. 2024).

    The edit is an attachment: adapters that act only where this library runs them.
    """

    Config = RecelerConfig
    paper: ClassVar[str] = RecelerObjective.paper
    objective = RecelerObjective
    uses_anchor = False
    attaches = True
