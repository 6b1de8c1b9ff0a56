"""What the library must know of a model family, and nothing else: one adapter per family."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, get_type_hints

from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.predictions import KINDS, Kind, Parametrization
from sublimate.diffusion.schedules import Schedule, from_scheduler
from sublimate.pipelines import backbones
from sublimate.pipelines.autoencoders import decode_latents, encode_images
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.tokens import TokenSpan

Pipeline = Any
"""An open `diffusers.DiffusionPipeline` of one of the backbone's classes."""

_PRECONDITIONED: dict[str, Kind] = {"epsilon": "edm", "v_prediction": "trigflow"}
"""What the prediction types of EDM's schedulers mean: F of Karras et al. 2022, eq. 7, and minus it."""

Network = Any
"""The family's diffusers network, or a player made from it."""


class Draws(Protocol):
    """One stream of random numbers per sample, on the CPU."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        """N(0, I), (batch, *shape)."""
        ...

    def uniform(self) -> Tensor:
        """Numbers in [0, 1), (batch,)."""
        ...

    def integers(self, high: int) -> Tensor:
        """Integers in [0, high), (batch,)."""
        ...


@dataclass(frozen=True)
class EntryPoint:
    """A linear layer, or a table of classes, through which text enters the denoiser.

    A table is the linear layer of one-hot rows, with a column of its weight for each of its entries.

    Attributes:
        component: the pipeline's component that holds it.
        module_name: the layer's name within the component.
        key: the condition's entry that reaches it.
        columns: the columns of its weight that multiply that entry.
        bias: whether it adds a bias.
    """

    component: str
    module_name: str
    key: str
    columns: slice
    bias: bool


@dataclass(frozen=True)
class StockSampling:
    """How a stock pipeline samples a student.

    Attributes:
        pipeline_class: name of the diffusers class to save.
        scheduler: a stock scheduler.
        call: options of the pipeline's call.
        few_steps: what it samples, with the times as the scheduler has them; None for a one-step student.
    """

    pipeline_class: str
    scheduler: Any
    call: Mapping[str, Any]
    few_steps: FewSteps | None = None


class Backbone(ABC):
    """A model family. Stateless: everything is read from the pipeline that is passed in.

    Attributes:
        pipeline_classes: the `_class_name`s of `model_index.json` that this adapter serves.
        network_attribute: the pipeline's component that denoises.
        text_components: its text encoders.
        guidance_scale: the family's usual guidance; 1 is none.
        sampler: the family's usual sampler.
        grid_spacing: the family's usual grid, of its schedule's `spacings`.
        no_guidance: options of the stock pipeline's call that mean no guidance.
        medium: what the stock pipeline's result calls its media, without the plural's s: "image" or "audio".
        media_range: the lowest and highest value of media, to which they are clamped; None where they have no bounds.
        shown: what the network sees besides text, "masks" or "low_res"; "" for nothing. `show` makes it a condition.
        shown_arguments: the stock call's arguments for that, as its model card writes them.
        told_crops: whether the network is told where a picture was cropped; `encode_prompts` says nowhere.
        draws_from_text: whether prompts alone are enough to draw by.
        optional_components: text encoders that a checkpoint may be without.
    """

    pipeline_classes: ClassVar[tuple[str, ...]]
    network_attribute: ClassVar[str]
    text_components: ClassVar[tuple[str, ...]] = ()
    guidance_scale: ClassVar[float] = 1.0
    sampler: ClassVar[str] = "ddim"
    grid_spacing: ClassVar[str] = "trailing"
    no_guidance: ClassVar[Mapping[str, Any]] = {}
    medium: ClassVar[str] = "image"
    media_range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    shown: ClassVar[Literal["", "masks", "low_res"]] = ""
    shown_arguments: ClassVar[tuple[str, ...]] = ()
    told_crops: ClassVar[bool] = False
    draws_from_text: ClassVar[bool] = True
    optional_components: ClassVar[tuple[str, ...]] = ()

    def check(self, pipe: Pipeline) -> None:
        """Makes sure that a pipeline has the family's own parts; families add what tells them from their relatives.

        Raises:
            ValueError: when one is missing, or of another family, naming it.
        """
        kind, network = type(pipe), getattr(pipe, self.network_attribute, None)
        own = get_type_hints(kind.__init__)[self.network_attribute]
        if not isinstance(network, own):
            raise ValueError(
                f"The {self.network_attribute} of this {kind.__name__} is of class {type(network).__name__}: the "
                "checkpoint is of another family than its model_index.json says."
            )
        for name in self.text_components:
            if name not in self.optional_components and not isinstance(getattr(pipe, name, None), nn.Module):
                raise ValueError(
                    f"This {kind.__name__} has no {name}: the checkpoint is not whole, or of another family than its "
                    "model_index.json says."
                )

    def components(self, pipe: Pipeline) -> dict[str, nn.Module]:
        """The networks a checkpoint consists of, by name: denoiser, text encoders, autoencoder, vocoder."""
        names = (self.network_attribute, *self.text_components, "vae")
        found = {name: getattr(pipe, name, None) for name in names}
        return {name: module for name, module in found.items() if isinstance(module, nn.Module)}

    def schedule(self, pipe: Pipeline, latent_shape: tuple[int, int, int] | None = None) -> Schedule:
        """The noise schedule the network was trained with, for x_t of a shape; the checkpoint's own unless given."""
        return from_scheduler(pipe.scheduler, latent_shape or self.latent_shape(pipe))

    def parametrization(self, pipe: Pipeline) -> Parametrization:
        """What the network predicts.

        Raises:
            ValueError: for a prediction type that is not known.
        """
        config = pipe.scheduler.config
        kind = config.get("prediction_type", "epsilon")
        if kind in _PRECONDITIONED and config.get("sigma_data") is not None:
            return Parametrization(_PRECONDITIONED[kind], config["sigma_data"])
        if kind not in KINDS:
            raise ValueError(f"The scheduler's prediction_type {kind!r} is not one of {', '.join(KINDS)}.")
        return Parametrization(kind)

    def published_defaults(self, pipe: Pipeline) -> dict[str, Any]:
        """How the checkpoint wants to be sampled, as far as folder and family say: entries of `Model.defaults`."""
        return {}

    @staticmethod
    @abstractmethod
    def call(
        network: Network, x_in: Tensor, t_net: Tensor, condition: Condition, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Runs the network.

        Args:
            network: the family's denoiser, or a player made from it.
            x_in: (batch, *latent_shape), scaled as the parametrization asks.
            t_net: (batch,) float32, what the schedule says the network is told.
            condition: of batch size batch, or without keys.
            features: names of modules whose output to return.

        Returns:
            the output, shaped like x_in, and the features by name: maps (batch, channels, height, width) or tokens
            (batch, tokens, channels).

        Raises:
            ValueError: when the condition lacks what the network needs, or holds what it cannot use.
        """

    @abstractmethod
    def latent_shape(
        self, pipe: Pipeline, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """(channels, height, width) of one x_t.

        Args:
            pipe: the pipeline.
            height, width: of the image in pixels, of a spectrogram in frames and bins; the checkpoint's own size
                unless given.

        Raises:
            ValueError: for a size the family cannot make.
        """

    @abstractmethod
    def encode_prompts(self, pipe: Pipeline, prompts: Sequence[str]) -> Condition:
        """What the network is told for each prompt; differentiable in the text encoders' weights.

        Raises:
            ValueError: for a prompt longer than the tokenizer's limit, naming it: nothing is cut off silently.
        """

    def encode_prefixes(self, pipe: Pipeline, prompts: Sequence[str], rows: int) -> Condition:
        """As `encode_prompts`, for who reads the first `rows` rows of each sequence alone.

        A family may leave out the rest where its text encoder is causal: no row sees what comes after it.
        """
        return self.encode_prompts(pipe, prompts)

    def null_condition(self, pipe: Pipeline) -> Condition:
        """The condition, of batch size 1, that stands for no text: the empty prompt's, unless the family differs.

        Without keys for an unconditional model, and for one that has always to be told a class.
        """
        return self.encode_prompts(pipe, [""])

    def any_condition(self, pipe: Pipeline) -> Condition:
        """A condition of batch size 1 that the network can be called with: the null condition, where there is one."""
        return self.null_condition(pipe)

    def prompt_argument(self, pipe: Pipeline) -> str:
        """How the stock pipeline's call is given a prompt, as model cards write it; "" where it takes none."""
        return '"..."' if self.text_components else ""

    def sizes(self, pipe: Pipeline, height: int | None = None, width: int | None = None) -> Condition:
        """What the network is told of the size it draws, of batch size 1; without keys where it is told none.

        `encode_prompts` tells it the checkpoint's own size; height and width are as in `latent_shape`.
        """
        return Condition()

    def show(self, pipe: Pipeline, *args: Any, **pictures: Any) -> Condition:
        """What the network is told of pictures, beside the text; the family's class says which it takes.

        Raises:
            ValueError: for a family that is shown none.
        """
        raise ValueError(f"{type(pipe).__name__} is told text alone, so there is nothing to show it.")

    def show_examples(self, pipe: Pipeline, images: Tensor, draws: Draws) -> Condition:
        """What the network is shown while it trains on images, (batch, 3, height, width) in [0, 1].

        Raises:
            ValueError: for a family that is shown none.
        """
        return self.show(pipe, images)

    def encode(self, pipe: Pipeline, images: Tensor) -> Tensor:
        """Media -> latents as x0, the mode of the posterior; differentiable.

        Media are images (batch, 3, height, width) in [0, 1], unless the family's class says otherwise.
        """
        return encode_images(pipe.vae, images)

    def decode(self, pipe: Pipeline, latents: Tensor) -> Tensor:
        """Latents -> media, about in their range, not clamped; differentiable."""
        return decode_latents(pipe.vae, latents)

    @abstractmethod
    def one_step(self, pipe: Pipeline, t: float | None = None) -> StockSampling:
        """What makes the stock pipeline return exactly the x0 that the network predicts from pure noise at t.

        Args:
            pipe: the pipeline, with the scheduler it was trained with.
            t: where the one-step student starts, in schedule time; t_max unless given.

        Raises:
            ValueError: when no stock scheduler does it.
        """

    def few_steps(self, pipe: Pipeline, few: FewSteps) -> StockSampling:
        """What makes the stock pipeline sample as `few` says, from the same noise.

        Args:
            pipe: the pipeline, with the scheduler it was trained with.
            few: the sampling.

        Raises:
            ValueError: when no stock scheduler does it.
        """
        raise ValueError(f"{type(pipe).__name__} has no stock scheduler for {few.sampler} sampling.")

    def reads_guidance(self, network: Network) -> bool:
        """Whether the network is told the guidance scale, as the condition's "guidance", instead of being guided."""
        return False

    def with_number_input(self, network: Network) -> Network:
        """The network with an input for one more number per sample, the guidance scale or a target time.

        Its weights are the network's own tensors, and the new layer is zero, so that it starts out ignored.

        Raises:
            ValueError: when the family's stock network has no such input.
        """
        raise ValueError(f"A {type(network).__name__} cannot be told the guidance scale or a target time.")

    def feature_taps(self, network: Network) -> tuple[str, ...]:
        """Modules whose output makes a good feature; the first `discriminator_taps` of them serve a discriminator."""
        return ()

    discriminator_taps: ClassVar[int] = 1

    def text_entry_points(self, pipe: Pipeline) -> list[EntryPoint]:
        """Every layer through which text enters the denoiser; none for an unconditional model."""
        return []

    def prompt_rows(self, pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
        """Where a prompt's own tokens sit, once per tokenizer whose tokens are rows of the condition.

        Raises:
            ValueError: for a prompt that does not fit.
        """
        return ()

    def find_concept(self, pipe: Pipeline, prompt: str, concept: str) -> tuple[TokenSpan, ...]:
        """Where a concept's tokens sit in a prompt, once per tokenizer whose tokens are rows of the condition.

        Raises:
            ValueError: for a prompt that does not fit or does not mention the concept.
        """
        return ()


def joint_entry_points(transformer: Network) -> list[EntryPoint]:
    """Where text enters a joint-attention transformer: its keys and values see mixed states, what is projected first
    does not."""
    names = {"context_embedder": "text", "time_text_embed.text_embedder.linear_1": "text.pooled"}
    layers = {name: transformer.get_submodule(name) for name in names}
    return [
        EntryPoint("transformer", name, names[name], slice(0, layer.in_features), layer.bias is not None)
        for name, layer in layers.items()
    ]


def refuse_other_sizes(own: tuple[int, int], height: int | None, width: int | None) -> None:
    """For networks of one size, (height, width) in pixels.

    Raises:
        ValueError: for another.
    """
    wanted = (own[0] if height is None else height, own[1] if width is None else width)
    if wanted != own:
        raise ValueError(f"This model makes images of {own[0]}x{own[1]} pixels only, not {wanted[0]}x{wanted[1]}.")


def refuse_unknown(condition: Condition, known: Sequence[str], network: Network) -> None:
    """Makes sure that nothing a network is told gets lost.

    Raises:
        ValueError: for an entry that the network cannot use.
    """
    if unused := sorted(condition.keys() - set(known)):
        raise ValueError(f"{type(network).__name__} cannot use the condition's {unused}: leave them out.")


@cache
def known_backbones() -> dict[str, Backbone]:
    """Every adapter in this folder, by the pipeline classes it serves."""
    found: dict[str, Backbone] = {}
    for module in pkgutil.iter_modules(backbones.__path__, backbones.__name__ + "."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Backbone) and value.__module__ == module.name:
                found |= {name: value() for name in getattr(value, "pipeline_classes", ())}
    return found


def backbone_for(pipeline_class: str) -> Backbone:
    """The adapter of a pipeline class.

    Raises:
        ValueError: for a family without adapter, naming those that have one.
    """
    found = known_backbones()
    if pipeline_class not in found:
        raise ValueError(f"{pipeline_class} is not supported; the known pipelines are {', '.join(sorted(found))}.")
    return found[pipeline_class]
