"""Model: an open checkpoint, the one type that training, erasure and evaluation take; and how to open one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import Tensor, nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.schedules import Schedule
from sublimate.pipelines.backbones.base import Backbone, EntryPoint, backbone_for
from sublimate.pipelines.carried import Carried, carried, without
from sublimate.pipelines.checkpoints import (
    INDEX,
    check_folder,
    keep_options,
    read_json,
    read_scheduler,
)
from sublimate.pipelines.locations import DEFAULTS_FILE, checkpoint_folder, first_line, lora_folder
from sublimate.pipelines.lora_files import fuse_lora
from sublimate.pipelines.progress import without_bars
from sublimate.pipelines.quantised import cast, is_quantised, plain_tensors
from sublimate.pipelines.single_files import holds_texts, open_parts, open_whole
from sublimate.pipelines.tokens import TokenSpan
from sublimate.pipelines.wholeness import check_loaded

if TYPE_CHECKING:
    from sublimate.pipelines.edit_attachment import InstalledAttachment


class Model:
    """An open checkpoint: a stock pipeline seen through its family's backbone.

    Attributes:
        pipeline: the stock diffusers pipeline; its networks are frozen and in evaluation mode.
        backbone: what is known of its family.
        denoiser: its network as (x_t, t, condition) -> Prediction.
        schedule: the noise schedule it was trained with.
        source: what it was opened from.
        defaults: "guidance_scale", "steps", "start", "few_steps", "sampler" and "noise_scale" (of the initial noise)
            from the checkpoint's `sublimate.json`, or, without that file, as far as its folder or family says them.
        folder: where on disk its checkpoint lies; None for one file, and for a pipeline that was never saved.
        loras: what was added to its weights when it was opened, for good.
        attached: what applied edits carry beside the weights, in the order in which it acts.
        carried: components that nothing here reads and the pipeline is without, such as a safety checker: still on
            disk, for whole exports to carry on.
    """

    def __init__(
        self,
        pipeline: Any,
        source: str,
        defaults: Mapping[str, Any] | None = None,
        carried: Carried | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.backbone: Backbone = backbone_for(type(pipeline).__name__)
        self.source = source
        self.defaults = dict(defaults or {})
        self.folder: Path | None = None
        self.loras: tuple[str, ...] = ()
        self.attached: list[InstalledAttachment] = []
        self.carried = carried
        self.backbone.check(pipeline)
        for module in self.components().values():
            module.requires_grad_(False).eval()
        self.schedule: Schedule = self.backbone.schedule(pipeline)
        self.denoiser = Denoiser(
            self.component(self.backbone.network_attribute),
            self.backbone.call,
            self.schedule,
            self.backbone.parametrization(pipeline),
            reads_guidance=self._reads_guidance(),
        )
        self._hash: tuple[Any, str] | None = None

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of all weights that are not quantised."""
        return next(p.dtype for p in self.denoiser.parameters() if not is_quantised(p))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one x_t at the checkpoint's own size."""
        return self.backbone.latent_shape(self.pipeline)

    @property
    def guidance_scale(self) -> float:
        """The guidance this checkpoint is usually sampled with; 1 is none."""
        return float(self.defaults.get("guidance_scale", self.backbone.guidance_scale))

    @property
    def noise_scale(self) -> float:
        """What the initial noise is multiplied by before the schedule scales it: 1 unless its scheduler differs."""
        return float(self.defaults.get("noise_scale", 1.0))

    @property
    def is_student(self) -> bool:
        """Whether it was trained to be drawn in one or few steps, and so knows few noise levels."""
        return "few_steps" in self.defaults or self.defaults.get("steps") == 1

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Model:
        """Moves every network, in place; what is attached and what is quantised keeps its precision."""
        for installed in self.attached:
            installed.module.to(device=device)
        # All of the pipeline's, also those that are none of the model's components.
        for module in self.pipeline.components.values():
            if not isinstance(module, nn.Module):
                continue
            module.to(device=device)
            if dtype is not None:
                cast(module, dtype)
        return self

    def components(self) -> dict[str, nn.Module]:
        """The networks, by name: denoiser, text encoders, autoencoder, vocoder."""
        return self.backbone.components(self.pipeline)

    def component(self, name: str) -> nn.Module:
        """One network.

        Raises:
            ValueError: for a name the model does not have.
        """
        components = self.components()
        if name not in components:
            raise ValueError(f"{self.source} has no network {name!r}; it has {', '.join(components)}.")
        return components[name]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by its full key, "unet/down_blocks.0.….weight"; without what is attached to a network."""
        return {
            f"{component}/{name}": parameter
            for component, module in self.components().items()
            for name, parameter in module.named_parameters()
            if ".processor." not in name
        }

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """What the denoiser is told for each prompt.

        Raises:
            ValueError: for a prompt longer than the tokenizer's limit, naming it.
        """
        return self.backbone.encode_prompts(self.pipeline, prompts)

    def encode_prefixes(self, prompts: Sequence[str], rows: int) -> Condition:
        """As `encode_prompts`, for who reads the first `rows` rows of each sequence alone: the rest may be missing."""
        return self.backbone.encode_prefixes(self.pipeline, prompts, rows)

    def null_condition(self) -> Condition:
        """The condition, of batch size 1, that stands for no text; without keys for an unconditional model."""
        return self.backbone.null_condition(self.pipeline)

    def any_condition(self) -> Condition:
        """A condition of batch size 1 that the denoiser can be called with: the null condition, where there is one."""
        return self.backbone.any_condition(self.pipeline)

    def show(self, **pictures: Tensor) -> Condition:
        """What the denoiser is told of pictures, beside the text; which ones, `backbone.show` says.

        Raises:
            ValueError: for a model that is shown none.
        """
        return self.backbone.show(self.pipeline, **pictures)

    def encode(self, images: Tensor) -> Tensor:
        """Media, such as images (batch, 3, height, width) in [0, 1] -> x0 (batch, *latent_shape); differentiable."""
        return self.backbone.encode(self.pipeline, images)

    def decode(self, latents: Tensor) -> Tensor:
        """x0 -> media, about in their range, not clamped; differentiable."""
        return self.backbone.decode(self.pipeline, latents)

    def render(self, latents: Tensor) -> Tensor:
        """x0 -> media as they are shown: decoded, and `bounded`."""
        return self.bounded(self.decode(latents))

    def bounded(self, media: Tensor) -> Tensor:
        """Media in float32, clamped to their range."""
        limits = self.backbone.media_range
        return media.float() if limits is None else media.float().clamp(*limits)

    def denoiser_with_number_input(self) -> Denoiser:
        """A denoiser over the same weights that can also be told the guidance scale or a target time.

        Raises:
            ValueError: when the family's stock network has no such input.
        """
        ours = self.denoiser
        network = self.backbone.with_number_input(ours.network)
        return Denoiser(network, ours.call, ours.schedule, ours.parametrization, reads_guidance=True)

    def feature_taps(self) -> tuple[str, ...]:
        """The modules whose outputs serve a discriminator by default; `backbone.feature_taps` knows more."""
        return self.backbone.feature_taps(self.denoiser.network)[: self.backbone.discriminator_taps]

    def text_entry_points(self) -> list[EntryPoint]:
        """Every linear layer through which text enters the denoiser."""
        return self.backbone.text_entry_points(self.pipeline)

    def prompt_rows(self, prompt: str) -> tuple[TokenSpan, ...]:
        """Where a prompt's own tokens sit in its condition, once per tokenizer whose tokens are rows of it."""
        return self.backbone.prompt_rows(self.pipeline, prompt)

    def find_concept(self, prompt: str, concept: str) -> tuple[TokenSpan, ...]:
        """Where a concept's tokens sit in a prompt's condition, once per tokenizer whose tokens are rows of it.

        Raises:
            ValueError: when the prompt does not mention the concept.
        """
        return self.backbone.find_concept(self.pipeline, prompt, concept)

    def content_hash(self) -> str:
        """SHA-256 over all weights in float32, by full key; the same on every device and for every file layout.

        What is attached counts too, in its order: the model is then another than its weights alone. Kept until a
        weight changes. In-place changes are noticed by their version, and those that bypass it (through `.data`) by a
        sample of each tensor's values.
        """
        tensors = self.tensors()
        state = tuple((key, t.data_ptr(), t._version, _sample(t)) for key, t in tensors.items())
        if self._hash is None or self._hash[0] != state:
            self._hash = state, weights_hash(tensors.items())
        if not self.attached:
            return self._hash[1]
        digests = (installed.attachment.digest for installed in self.attached)
        return hashlib.sha256(":".join([self._hash[1], *digests]).encode()).hexdigest()

    def tensors(self, instead: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, Tensor]:
        """Every plain tensor of the weights by its full key, sorted, as `content_hash` reads them.

        Keys are without the wrapper that some releases of transformers put around a text model.

        Args:
            instead: what to read in place of some parameters, by the key that `parameters` gives them.
        """
        named = {
            name.replace("/text_model.", "/", 1): tensor
            for key, parameter in self.parameters().items()
            for name, tensor in plain_tensors(key, instead.get(key, parameter).detach())
        }
        return dict(sorted(named.items()))

    def schedule_at(self, latent_shape: tuple[int, int, int]) -> Schedule:
        """The schedule for x_t of this shape: where it depends on the size, times of grids and of training move."""
        own = latent_shape == self.latent_shape
        return self.schedule if own else self.backbone.schedule(self.pipeline, latent_shape)

    def _reads_guidance(self) -> bool:
        """Whether the number its network is told, if any, is the guidance scale and not the time of a jump's end."""
        network = self.component(self.backbone.network_attribute)
        sampler = (self.defaults.get("few_steps") or {}).get("sampler")
        return sampler != "trajectory" and self.backbone.reads_guidance(network)


def _sample(tensor: Tensor) -> float:
    flat = tensor.flatten()
    return float(flat[:: max(1, flat.numel() // 64)].double().sum())


def open_model(
    source: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    config: str | Path | None = None,
    loras: Sequence[str | Path] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Model:
    """Opens a checkpoint; every network ends up in one precision, frozen and in evaluation mode.

    Args:
        source: a diffusers folder, a single `.safetensors` file, the name of a packaged model ("ink"), or a hub id
            ("owner/name"). What exists on disk comes first.
        revision: branch, tag or commit of a hub id.
        variant: of the weights' files, such as "fp16".
        token: for gated or private repositories of the hub.
        config: a diffusers folder, or hub id, with the configuration and tokenizers of a single file's architecture;
            of a whole Stable Diffusion file it comes from the hub unless given, but for Stable Diffusion 2, whose
            files rarely say what they predict. What a file without text encoders lacks, as those of FLUX.1 and many of
            Stable Diffusion 3 do, is opened from there.
        loras: added to the weights in this order, for good: files, folders or hub ids of the checkpoint's family, as
            `SOURCE`, `SOURCE@0.7` with a scale, or `SOURCE:FILE` where there are several files. With the folder of a
            student that this library wrote, the model is sampled as that student.
        dtype: precision of all weights that are neither quantised nor kept in float32 by transformers, as T5's `wo`.
        device: where to put them.

    Raises:
        ValueError: when the checkpoint is missing, incomplete, damaged, a pickle or of an unknown family, or a LoRA is
            not one of it.
    """
    path, name = Path(source).expanduser(), str(source)
    if path.is_file():
        if revision or variant:
            raise ValueError(f"{path} is one file: it has no revision and no variant.")
        file, alone = None, not holds_texts(path)
        folder = None if config is None else checkpoint_folder(config, token=token, weights=alone)
        if folder is not None and alone:
            pipeline, unread = _open_folder(folder, None, dtype, open_parts(path, dtype, folder))
        else:
            pipeline, unread = open_whole(path, dtype, token, folder), None
    elif config is not None:
        raise ValueError(f"{name} is no single file and has its own configuration: leave out config.")
    else:
        folder = checkpoint_folder(name, revision=revision, variant=variant, token=token)
        pipeline, unread = _open_folder(folder, variant, dtype)
        file = folder / DEFAULTS_FILE if (folder / DEFAULTS_FILE).is_file() else None
    defaults = {} if file is None else read_json(file)
    for lora in loras:
        record = lora_folder(fuse_lora(pipeline, lora, token=token), token=token) / DEFAULTS_FILE
        if record.is_file() and "start" in (found := read_json(record)):
            # It is a student, and sampled as it was made to be.
            file, defaults, pipeline.scheduler = record, found, read_scheduler(record.parent)
    if file is None:
        defaults = backbone_for(type(pipeline).__name__).published_defaults(pipeline)
    # transformers keeps the precision of a text encoder's file; a mixed pipeline would fail at its first step.
    model = Model(pipeline, name, defaults, unread).to(device, dtype)
    model.loras = tuple(map(str, loras))
    model.folder = None if path.is_file() else folder
    return model


def weights_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over named tensors in float32, in the order given; the same on every device."""
    digest = hashlib.sha256()
    for key, tensor in tensors:
        digest.update(f"{key}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


@without_bars()
def _open_folder(
    folder: Path, variant: str | None, dtype: torch.dtype, parts: Mapping[str, nn.Module] = MappingProxyType({})
) -> tuple[Any, Carried | None]:
    """A folder's pipeline, with some parts from elsewhere."""
    kind = check_folder(folder, variant, parts)
    backbone = backbone_for(kind)
    cls, index = getattr(diffusers, kind), read_json(folder / INDEX)
    unread = carried(folder, index, cls, variant)
    options = {"dtype": dtype, "variant": variant, "use_safetensors": True, "local_files_only": True}
    try:
        pipeline = cls.from_pretrained(folder, **options, **without(cls, unread), **parts)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:  # no library to quantise
        raise ValueError(f"{folder} cannot be opened as a {kind} ({first_line(error)})") from error
    check_loaded(pipeline, folder, variant, backbone.text_components)
    keep_options(pipeline, index)
    return pipeline, unread
