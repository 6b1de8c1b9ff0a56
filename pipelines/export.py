"""Writing students as artefacts that stock diffusers opens, with their provenance and a model card."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sublimate.diffusion.denoisers import Denoiser
from sublimate.pipelines.backbones.base import StockSampling
from sublimate.pipelines.cards import CARD_FILE, inherited_license, is_hub_id, model_card, public_name
from sublimate.pipelines.checkpoints import INDEX, cast_file, keep_options, tidy_config
from sublimate.pipelines.edit_attachment import refuse_attached
from sublimate.pipelines.edit_stack import differs_from_disk
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.folders import written_aside
from sublimate.pipelines.locations import DEFAULTS_FILE
from sublimate.pipelines.lora_files import LORA_FILE, lora_state, save_lora
from sublimate.pipelines.model import Model
from sublimate.pipelines.progress import without_bars
from sublimate.pipelines.quantised import check_unquantised
from sublimate.pipelines.speedupnet import attached_speedupnet
from sublimate.pipelines.versions import versions

_AS_BASE = ("steps", "guidance_scale", "start", "few_steps", "sampler", "noise_scale")
"""How a base is sampled, and what was tuned from it."""


def export_student(
    model: Model,
    network: nn.Module,
    folder: str | Path,
    *,
    t: float | None = None,
    few_steps: FewSteps | None = None,
    as_base: bool = False,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
    title: str | None = None,
    license: str | None = None,
) -> Path:
    """Writes a student as a diffusers folder of stock classes.

    A fresh process without this library opens it with `DiffusionPipeline.from_pretrained` and gets, with
    `num_inference_steps=1` and the family's value for no guidance, exactly the student's x0 at time t from the
    pipeline's own initial noise; for a student of several steps, with the call that the card shows, what our own
    sampler draws from the same noise. Beside `model_index.json` lie `sublimate.json` and a model card.

    Args:
        model: the student's base: everything but the denoiser is taken from it.
        network: the student, as a denoiser or as its network; adapters are merged into a copy.
        folder: where to write; an earlier export there is replaced once the new one is complete.
        t: the time a one-step student starts at; the schedule's end unless given.
        few_steps: how a student of several steps is sampled; None for a student of one step.
        as_base: it is no such student, but sampled as the base is: with the base's scheduler and defaults.
        dtype: precision of the saved weights; None keeps theirs. Loaders make float32 of them unless told otherwise.
        provenance: how it was made; JSON values. The base and the versions are added.
        title: the card's headline.
        license: the card's license; the base model's unless given.

    Returns:
        The folder.

    Raises:
        ValueError: when no stock pipeline runs this student exactly, as with an edit's attachment, or the folder holds
            something else.
    """
    refuse_attached(model, network)
    student = _stock_network(model, network)
    stock = stock_sampling(model, "weights", t, few_steps, as_base=as_base)
    pipeline = _stock_pipeline(model, student, stock)
    record = _record("weights", model, provenance, stock, t, as_base)
    usage = [
        "from diffusers import DiffusionPipeline",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")',
    ]
    card = _card(model, record, usage, title or f"{_pace(record)} {'model' if as_base else 'student'}", license)
    return _write(Path(folder), INDEX, record, card, _saving(model, pipeline), dtype)


def export_lora(
    model: Model,
    network: nn.Module,
    folder: str | Path,
    *,
    t: float | None = None,
    few_steps: FewSteps | None = None,
    as_base: bool = False,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
    title: str | None = None,
    license: str | None = None,
) -> Path:
    """Writes a student's adapters as a LoRA that `load_lora_weights` reads, with the scheduler that goes with it.

    A UNet's is written a second time, in kohya's layout for other programs (`pipelines/lora_files.py`).

    Scales are folded into the weights, and all layers get the largest rank, padded with zeros: loaders differ in what
    they make of other scales and mixed ranks.

    Args:
        model: the student's base.
        network: the student, as a denoiser or as its network, with LoRA layers.
        folder: where to write; an earlier export there is replaced once the new one is complete.
        t: the time a one-step student starts at; the schedule's end unless given.
        few_steps: how a student of several steps is sampled; None for a student of one step.
        as_base: it is no such student, but sampled as the base is: with the base's scheduler and defaults.
        dtype: precision of the saved weights; None keeps theirs. Loaders make float32 of them unless told otherwise.
        provenance: how it was made; JSON values. The base and the versions are added.
        title: the card's headline.
        license: the card's license; the base model's unless given.

    Returns:
        The folder.

    Raises:
        ValueError: when the network has no LoRA layers, the stock pipeline loads none, the model carries edits or
            LoRAs that its checkpoint has not, or the folder holds something else.
    """
    refuse_attached(model, network)
    if differs_from_disk(model):
        raise ValueError(
            f"A LoRA would be put on {model.source} as it is on disk, without the edits and LoRAs that this model "
            "carries: export the student whole (export_student)."
        )
    state = lora_state(_unwrapped(model, network), model.backbone.network_attribute)
    stock = stock_sampling(model, "lora", t, few_steps, as_base=as_base)
    record = _record("lora", model, provenance, stock, t, as_base)
    scheduler = type(stock.scheduler).__name__
    base = model.source if is_hub_id(model.source) else "path/to/the/base/model"
    usage = [
        f"from diffusers import {scheduler}, {stock.pipeline_class}",
        "",
        f'pipeline = {stock.pipeline_class}.from_pretrained("{base}")',
        'pipeline.load_lora_weights("path/to/this/folder")',
        f'pipeline.scheduler = {scheduler}.from_pretrained("path/to/this/folder", subfolder="scheduler")',
    ]
    card = _card(model, record, usage, title or f"{_pace(record)} LoRA", license)

    def save(aside: Path) -> None:
        save_lora(state, aside)
        stock.scheduler.save_pretrained(aside / "scheduler")

    return _write(Path(folder), LORA_FILE, record, card, save, dtype)


def save_model(
    model: Model,
    folder: str | Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    title: str | None = None,
    license: str | None = None,
) -> Path:
    """Writes a model as it is now, edits included, as a diffusers folder with its own scheduler.

    Args:
        model: what to write.
        folder: where to; an earlier export there is replaced once the new one is complete.
        provenance: how it was made; JSON values. The base, unless it is given, and the versions are added.
        title: the card's headline.
        license: the card's license; the base model's unless given.

    Returns:
        The folder.

    Raises:
        ValueError: when the folder holds something else, or an edit's attachment or a SpeedUpNet is on the model.
    """
    refuse_attached(model)
    if attached_speedupnet(model.denoiser.network) is not None:
        raise ValueError(f"{model.source} carries a SpeedUpNet, which stock diffusers cannot hold: detach it first.")
    base = {"base": {"source": public_name(model.source)}}
    record = {
        **model.defaults,
        "kind": "weights",
        "content_hash": model.content_hash(),
        "provenance": _with_versions({**base, **(provenance or {})}),
    }
    usage = [
        "from diffusers import DiffusionPipeline",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")',
    ]
    card = _card(model, record, usage, title or "Edited model", license)
    return _write(Path(folder), INDEX, record, card, _saving(model, model.pipeline))


def _unwrapped(model: Model, network: nn.Module) -> nn.Module:
    """The network of a student, if a stock pipeline would read its output as the student does."""
    if not isinstance(network, Denoiser):
        return network
    ours = model.denoiser
    for name in ("call", "parametrization", "schedule"):
        if getattr(network, name) is not getattr(ours, name) and getattr(network, name) != getattr(ours, name):
            raise ValueError(
                f"The student's {name} differs from its base's, so no stock pipeline runs it: export an attachment."
            )
    return network.network


def _stock_network(model: Model, network: nn.Module) -> ModelMixin:
    """The student as a plain network of a diffusers class, adapters merged.

    Raises:
        ValueError: when it has parameters that its class does not build from its config.
    """
    network = _unwrapped(model, network)
    if any(isinstance(module, BaseTunerLayer) for module in network.modules()):
        network = _merged(network)
    if not isinstance(network, ModelMixin) or type(network).__module__.split(".")[0] != "diffusers":
        raise ValueError(f"{type(network).__name__} is not a class of diffusers: export an attachment instead.")
    with torch.device("meta"):
        plain = {name: p.shape for name, p in type(network).from_config(network.config).named_parameters()}
    own = {name: p.shape for name, p in network.named_parameters()}
    if odd := sorted(name for name in plain.keys() | own.keys() if plain.get(name) != own.get(name)):
        raise ValueError(
            f"A stock {type(network).__name__} has no such parameter {odd[0]!r} as the student: export an attachment."
        )
    return network


def _merged(network: nn.Module) -> nn.Module:
    """A copy in which every adapter is added to the layer it sits on."""
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            check_unquantised({name: module.get_base_layer().weight}, "Merging an adapter")
            module.merge(safe_merge=True)
            network.set_submodule(name, module.get_base_layer())
    return network


def stock_sampling(
    model: Model,
    kind: Literal["weights", "lora"],
    t: float | None = None,
    few_steps: FewSteps | None = None,
    *,
    as_base: bool = False,
) -> StockSampling:
    """How a stock pipeline samples a student of the model, before there is one; arguments are the exports'.

    Raises:
        ValueError: when none does it exactly, or the model carries an edit's attachment, or, for kind "lora", when the
            stock pipeline loads none.
    """
    refuse_attached(model)
    if as_base:
        stock = StockSampling(type(model.pipeline).__name__, model.pipeline.scheduler, model.defaults.get("call", {}))
    elif few_steps is None:
        stock = model.backbone.one_step(model.pipeline, t)
    elif t is not None and t != few_steps.call_times(model.schedule)[0]:
        raise ValueError(f"A student of few steps starts at its first time, not at {t}: leave out t.")
    else:
        stock = model.backbone.few_steps(model.pipeline, few_steps)
    if kind == "lora" and not hasattr(getattr(diffusers, stock.pipeline_class), "load_lora_weights"):
        raise ValueError(f"{stock.pipeline_class} loads no LoRA: train and export the student's weights instead.")
    return stock


def _stock_pipeline(model: Model, student: nn.Module, stock: StockSampling) -> Any:
    """The base's pipeline with the student in it; components are shared, not copied."""
    cls = getattr(diffusers, stock.pipeline_class)
    accepted = inspect.signature(cls.__init__).parameters
    available = {
        **{name: value for name, value in model.pipeline.config.items() if not name.startswith("_")},
        **model.pipeline.components,
        model.backbone.network_attribute: student,
        "scheduler": stock.scheduler,
    }
    pipeline = cls(**{name: value for name, value in available.items() if name in accepted})
    keep_options(pipeline, available)
    return pipeline


def _record(
    kind: str, model: Model, provenance: Mapping[str, Any] | None, stock: StockSampling, t: float | None, as_base: bool
) -> dict[str, Any]:
    """What `sublimate.json` holds: `call` is for the stock pipeline, what stands beside it for our own samplers."""
    base = {"source": public_name(model.source), "content_hash": model.content_hash()}
    few = stock.few_steps
    sampling: dict[str, Any] = {
        "steps": 1,
        "guidance_scale": 1.0,
        "start": float(model.schedule.t_max if t is None else t),
    }
    if as_base:
        sampling = {key: model.defaults[key] for key in _AS_BASE if key in model.defaults}
    elif few is not None:
        times = few.call_times(model.schedule)
        sampling = {
            "steps": few.steps,
            "guidance_scale": few.guidance_scale,
            "start": times[0],
            "few_steps": replace(few, times=times).to_dict(),
        }
    return {
        "kind": kind,
        **sampling,
        "call": dict(stock.call),
        "provenance": _with_versions({**(provenance or {}), "base": base}),
    }


def _with_versions(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({**provenance, "versions": versions()}))


def _card(model: Model, record: Mapping[str, Any], usage: list[str], title: str, license: str | None) -> str:
    """The model card; `usage` makes a `pipeline`, the call that the record holds is added."""
    prompt, medium = model.backbone.prompt_argument(model.pipeline), model.backbone.medium
    call = (f"{name}={value!r}" for name, value in record.get("call", {}).items())
    arguments = ", ".join([*([prompt] if prompt else []), *model.backbone.shown_arguments, *call])
    student = "start" in record
    return model_card(
        title=title,
        kind=record["kind"],
        summary=_summary(record, "an image" if medium == "image" else "a sound"),
        usage="\n".join([*usage, f"{medium} = pipeline({arguments}).{medium}s[0]"]),
        base=model.source,
        provenance=record["provenance"],
        tags=(_pace(record).lower(), "distillation") if student else (),
        license=license or inherited_license(model.folder),
    )


def _pace(record: Mapping[str, Any]) -> str:
    if "start" not in record:
        return "Fine-tuned"
    return "One-step" if record["steps"] == 1 else "Few-step"


def _summary(record: Mapping[str, Any], result: str) -> str:
    """The card's first sentences."""
    if "start" not in record:
        return "A LoRA for its base." if record["kind"] == "lora" else "A diffusers pipeline with changed weights."
    few, start = record.get("few_steps"), f"starting from pure noise at t = {record['start']:g}."
    if few is None or few["steps"] == 1:
        return f"Draws {result} in a single network pass, {start}"
    summary = f"Draws {result} in {few['steps']} network passes by {few['sampler']} sampling, {start}"
    if few["sampler"] == "trajectory" and few["eta"] < 1:
        summary += (
            " Stock pipelines cannot tell the network where to jump: with them it jumps to clean data (gamma 1)."
        )
    return summary


def _saving(model: Model, pipeline: Any) -> Callable[[Path], None]:
    """Writes a pipeline of the model's, with what the model carries."""

    def save(aside: Path) -> None:
        pipeline.save_pretrained(aside)
        if model.carried is not None:
            model.carried.copy_to(aside)

    return save


@without_bars()
def _write(
    folder: Path,
    marker: str,
    record: Mapping[str, Any],
    card: str,
    save: Callable[[Path], None],
    dtype: torch.dtype | None = None,
) -> Path:
    with written_aside(folder, marker) as aside:
        save(aside)
        for file in aside.rglob("*.json"):
            tidy_config(file)
        if dtype is not None:
            for file in aside.rglob("*.safetensors"):
                cast_file(file, dtype)
        (aside / DEFAULTS_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (aside / CARD_FILE).write_text(card, encoding="utf-8")
    return folder
