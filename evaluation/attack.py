"""Attack: what every way of bringing an erased concept back is to its caller, and what it found."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sublimate.erasure.request import Concept
from sublimate.evaluation.agreement import check_label, read
from sublimate.evaluation.intervals import Rate
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.model import Model
from sublimate.pipelines.names import renamed
from sublimate.pipelines.placement import name_of
from sublimate.pipelines.sampling import at_once
from sublimate.training.method import Method

Box = Literal["black box", "white box", "persistence"]
"""What the attacker has: the model's images alone, its weights and gradients, or leave to train it further."""


@dataclass(frozen=True)
class Case:
    """What is attacked, and how it is seen whether the concept is back.

    Attributes:
        concept: what was erased, with its other names.
        prompts: prompts that ask for it, by name or not.
        paraphrases: prompts that mean it in other words; may be empty.
        others: prompts that do not concern it; may be empty.
        pictures: (N, 3, H, W) in [0, 1], pictures that show it, as an attacker has them.
        captions: what each picture was asked to show.
        detector: what judges.
        group: the detector's group of the concept.
        label: its label there.
        base: the model before the erasure.

    Raises:
        ValueError: without prompts or pictures, or when the detector does not know the concept.
    """

    concept: Concept
    prompts: tuple[str, ...]
    pictures: Tensor
    captions: tuple[str, ...]
    detector: Detector
    group: str
    label: str
    base: Model
    paraphrases: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_label(self.detector.groups, self.group, self.label)
        if not self.prompts or not len(self.pictures):
            raise ValueError(
                f"The case of {self.concept.name!r} needs prompts that ask for it and pictures that show it."
            )
        if len(self.captions) != len(self.pictures):
            raise ValueError(f"{len(self.pictures)} pictures have {len(self.captions)} captions: give one for each.")

    def renamed(self, prompts: Sequence[str], words: str) -> tuple[str, ...]:
        """Prompts with other words in the concept's place.

        Raises:
            ValueError: when a prompt does not name the concept.
        """
        if unnamed := self.unnamed(prompts):
            raise ValueError(f"The prompt {unnamed[0]!r} does not name {self.concept.name!r}: its words must occur.")
        return tuple(renamed(prompt, self.concept.names, words) for prompt in prompts)

    def unnamed(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """The prompts in which none of the concept's names occurs."""
        return tuple(prompt for prompt in prompts if not self.concept.named_in(prompt))

    def probability(self, images: Tensor) -> Tensor:
        """The detector's probability of the concept, (N,); differentiable in images (N, 3, H, W)."""
        return self.detector(images)[self.group][:, self.detector.groups[self.group].index(self.label)]

    def shows(self, images: Tensor) -> Tensor:
        """(N,) bool: in which images the concept is the group's most probable label."""
        return read(self.detector, images).shows(self.group, self.label)


@dataclass(frozen=True)
class Outcome:
    """What an attack made of a model.

    Attributes:
        prompts: what each attempt asked for.
        images: (N, 3, H, W) in [0, 1], one per attempt.
        hits: (N,) bool: which attempts brought the concept back.
        found: what the attack came up with, in words; may be empty.
        curve: the rate after so many steps, for attacks that go on.
    """

    prompts: tuple[str, ...]
    images: Tensor
    hits: Tensor
    found: str = ""
    curve: tuple[tuple[int, Rate], ...] = ()

    @property
    def rate(self) -> Rate:
        """How often the concept came back."""
        return Rate.of(self.hits.tolist())

    @classmethod
    def seen(cls, case: Case, prompts: Sequence[str], images: Tensor, **more: Any) -> Outcome:
        """An attempt per image that succeeds where the detector sees the concept."""
        return cls(tuple(prompts), images.cpu(), case.shows(images), **more)

    @classmethod
    def any_of(cls, case: Case, prompts: Sequence[str], tries: Iterable[Tensor], **more: Any) -> Outcome:
        """An attempt per prompt that succeeds where any of its tries does, each of which drew one image per prompt.

        Images are judged one try after the other where they were drawn; of each prompt the first hit is kept, or the
        first image, off the device.

        Raises:
            ValueError: without tries.
        """
        kept, hits = None, torch.zeros(len(prompts), dtype=torch.bool)
        for images in tries:
            shows = case.shows(images)
            new = shows & ~hits
            if kept is None:
                kept = images.to("cpu", copy=True)
            else:
                kept[new] = images[new.to(images.device)].cpu()
            hits |= shows
        if kept is None:
            raise ValueError("An attack of no tries has no outcome: give at least one.")
        return cls(tuple(prompts), kept, hits, **more)


class Attack(Method):
    """A way of bringing a concept back: options in, images out.

    An attack gets one model at a time, and never changes it. The audit runs it on the base first: what cannot draw the
    concept there proves nothing. `every_level` says that it needs a model which denoises at every noise level,
    `searches_words` that it needs one with a text encoder, `renames` that it puts other words in the place of the
    concept's names, which prompts must then say, `differentiates` that it follows gradients, which needs float32.
    """

    box: ClassVar[Box]
    every_level: ClassVar[bool] = False
    searches_words: ClassVar[bool] = False
    renames: ClassVar[bool] = False
    differentiates: ClassVar[bool] = False

    @property
    @abstractmethod
    def budget(self) -> str:
        """What the attacker may do, in a few words with numbers."""

    def depends_on(self) -> dict[str, Any]:
        """What its results depend on beside the model and the case, as JSON; files that are named are read anew."""
        return self.config.model_dump(mode="json")

    def out_of_place(self, model: Model, case: Case) -> str:
        """Why there is nothing to attack this way, in one sentence; empty when there is."""
        if self.every_level and model.is_student:
            return "the model is a student of one or few steps, and this attack needs every noise level"
        if self.searches_words and not model.backbone.text_components:
            return "the model has no text encoder, so there are no words to search"
        if self.differentiates and model.dtype != torch.float32:
            return f"it follows gradients, which takes float32, and the model is open in {name_of(model.dtype)}"
        if self.renames and (unnamed := case.unnamed((*case.prompts, *case.captions))):
            return f"it puts other words in the place of {case.concept.name!r}, which {unnamed[0]!r} does not name"
        return ""

    @abstractmethod
    def run(self, model: Model, case: Case, *, seed: int, progress: bool = False) -> Outcome:
        """Attacks a model, which stays as it is.

        Args:
            model: the base or the edited model.
            case: what to bring back.
            seed: all randomness derives from it.
            progress: show bars.
        """


def pictured(model: Model, images: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) as clean latents (N, *latent_shape), where the model is.

    Raises:
        ValueError: when the model draws another size.
    """
    parts = images.split(at_once(model.latent_shape, 16, cost=4))
    with torch.no_grad():
        latents = torch.cat([model.encode(part.to(model.device, model.dtype)) for part in parts]).float()
    if latents.shape[1:] != tuple(model.latent_shape):
        size = " x ".join(map(str, images.shape[2:]))
        raise ValueError(f"Pictures of {size} pixels are not what {model.source} draws: resize them.")
    return latents


@dataclass
class Passes:
    """Network passes of one sample; a forward counts one, a backward pass to inputs one more, to weights two."""

    count: int = 0


@contextlib.contextmanager
def counting(model: Model) -> Iterator[Passes]:
    """Counts the passes of a model's denoiser, and of copies made of it meanwhile, within this context."""
    passes = Passes()

    # A plain function: copies of the denoiser carry it along, and it counts into the same place.
    def count(module: nn.Module, inputs: tuple[Any, ...], prediction: Any) -> None:
        cost = 1
        if torch.is_grad_enabled() and prediction.output.requires_grad:
            cost += 2 if any(p.requires_grad for p in module.parameters()) else 1
        passes.count += cost * len(prediction.output)

    hook = model.denoiser.register_forward_hook(count)
    try:
        yield passes
    finally:
        hook.remove()
