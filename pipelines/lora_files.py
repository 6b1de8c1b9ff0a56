"""LoRAs as files: PEFT's keys, which diffusers loads, and kohya's, which A1111 and ComfyUI load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sublimate.pipelines.locations import first_line
from sublimate.pipelines.lora_sources import LORA_FILE, LoraSource
from sublimate.pipelines.progress import without_bars
from sublimate.pipelines.quantised import has_quantised

KOHYA_FILE = "kohya.safetensors"

_KOHYA_FACTORS = {"lora_A": "lora_down", "lora_B": "lora_up"}


def lora_state(network: nn.Module, component: str) -> dict[str, Tensor]:
    """A network's adapters as PEFT's keys; scales are folded in, ranks made equal by zeros.

    Raises:
        ValueError: when a layer has several adapters, or none has any.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in network.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if len(layer.active_adapters) != 1:
            raise ValueError(f"{name} has the adapters {layer.active_adapters}: a LoRA file holds exactly one.")
        adapter = layer.active_adapters[0]
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        factors[name] = down.detach().float().cpu(), (up.detach().float() * layer.scaling[adapter]).cpu()
    if not factors:
        raise ValueError(f"{type(network).__name__} has no LoRA layers: export its weights instead.")
    rank = max(len(down) for down, _ in factors.values())
    state = {}
    for name, (down, up) in factors.items():
        missing = rank - len(down)
        state[f"{component}.{name}.lora_A.weight"] = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
        padding = up.new_zeros(len(up), missing, *up.shape[2:])
        state[f"{component}.{name}.lora_B.weight"] = torch.cat([up, padding], 1)
    return state


def kohya_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same LoRA under kohya's keys: `lora_unet_<layer>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    Layers keep diffusers' names, with underscores for dots: those programs know them for Stable Diffusion 1, 2 and XL.

    Args:
        state: by PEFT's keys, of a UNet and its text encoders.

    Raises:
        ValueError: for another network, whose layers kohya's layout fuses or names otherwise.
    """
    encoders = {"text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
    if any(key.startswith("text_encoder_2.") for key in state):
        encoders["text_encoder"] = "lora_te1"
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        component, _, rest = key.partition(".")
        layer, factor, weight = rest.rsplit(".", 2)
        if component != "unet" and component not in encoders:
            raise ValueError(f"Kohya's layout has no layers of a {component}: use {LORA_FILE}.")
        name = f"{encoders.get(component, 'lora_unet')}_{layer.replace('.', '_')}"
        found[f"{name}.{_KOHYA_FACTORS[factor]}.{weight}"] = value
        if factor == "lora_A":
            # The scale is alpha / rank, and nothing is left to scale.
            found[f"{name}.alpha"] = torch.tensor(float(len(value)))
    return found


def save_lora(state: Mapping[str, Tensor], folder: Path) -> None:
    """Writes a LoRA into a folder: `LORA_FILE`, and `KOHYA_FILE` beside it for UNets and their text encoders."""
    contiguous = {key: value.contiguous() for key, value in state.items()}
    save_file(contiguous, folder / LORA_FILE, {"format": "pt"})
    if not any(key.startswith("transformer.") for key in state):
        save_file(kohya_state(contiguous), folder / KOHYA_FILE, {"format": "pt"})


def fuse_lora(pipeline: Any, source: str | Path, *, token: str | bool | None = None) -> Path:
    """Adds a LoRA to the weights of a stock pipeline, in place: as if it had been saved after `fuse_lora`.

    Args:
        pipeline: a diffusers pipeline, in the precision in which the sum is to be rounded.
        source: a `.safetensors` file, a folder or a hub id; any layout that diffusers reads. `SOURCE:FILE` names one
            of several files of a folder or a hub id, and `@0.7` behind either a scale other than 1.
        token: for gated or private repositories of the hub.

    Returns:
        where it lies, as it was named; of a hub id no such path exists.

    Raises:
        ValueError: when it is a pickle, missing, damaged or one of several files, for a scale that is no number, when
            nothing of it fits the pipeline, or when the pipeline takes no LoRAs or is quantised.
    """
    kind, asked = type(pipeline).__name__, LoraSource.read(source)
    found, file = asked.found(token)
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(f"A {kind} takes no LoRAs: leave out {source}.")
    networks = {n: m for n, m in pipeline.components.items() if isinstance(m, nn.Module)}
    if quantised := [name for name, network in networks.items() if has_quantised(network)]:
        raise ValueError(f"{source} cannot be added to a {quantised[0]} that is quantised: open one that is not.")
    try:
        with without_bars():
            options = {"weight_name": file, "use_safetensors": True, "token": token}
            pipeline.load_lora_weights(found, adapter_name="fused", **options)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{source} cannot be opened as a LoRA of a {kind} ({first_line(error)})") from error
    carrying = [name for name, adapters in pipeline.get_list_adapters().items() if "fused" in adapters]
    if not carrying:
        raise ValueError(f"Nothing of the LoRA {source} fits a {kind}: it belongs to another family.")
    pipeline.fuse_lora(components=carrying, lora_scale=asked.scale, safe_fusing=True)
    pipeline.unload_lora_weights()
    return asked.path
