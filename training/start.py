"""Where a student starts that does not start as its teacher: as another one, of an earlier stage."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sublimate.diffusion.denoisers import Denoiser
from sublimate.pipelines.checkpoints import refuse_pickle
from sublimate.pipelines.locations import first_line
from sublimate.pipelines.lora_files import LORA_FILE
from sublimate.pipelines.model import open_model, weights_hash
from sublimate.training.checkpoints import load_exactly
from sublimate.training.players import Player


def start_from(player: Player, source: str, component: str) -> str:
    """Gives a student, which has not trained yet, the weights of a trained one.

    Args:
        player: the student.
        source: for a full player a model whose network is of the same shape, as `open_model` takes it; for a LoRA the
            folder of a LoRA of the same layers and rank, or its file.
        component: the name of its network in a pipeline, such as "unet".

    Returns:
        The hash of the weights.

    Raises:
        ValueError: when there are none, or they do not fit.
    """
    lora = player.config.kind == "lora"
    parameters = player.trainable()
    tensors = _lora(Path(source).expanduser(), player, component) if lora else _whole(player, source)
    try:
        load_exactly(parameters, tensors, f"The student in {source}")
    except ValueError as error:
        alike = "its rank and target_modules" if lora else "the same network"
        raise ValueError(f"{error} Give objective.student {alike}.") from error
    return weights_hash(tensors.items())


def _whole(player: Player, source: str) -> dict[str, Tensor]:
    other, ours = open_model(source).denoiser, player.module
    if isinstance(ours, Denoiser) and ours.parametrization != other.parametrization:
        raise ValueError(f"The network of {source} predicts something else than the teacher's: train one of its own.")
    return {f"network.{name}": parameter.detach() for name, parameter in other.network.named_parameters()}


def _lora(source: Path, player: Player, component: str) -> dict[str, Tensor]:
    """A LoRA by the names of a player's parameters; files have its scale folded in, which the player's layers add."""
    refuse_pickle(source)
    file = source / LORA_FILE if source.is_dir() else source
    try:
        with safe_open(file, framework="pt") as opened:
            told = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{source} holds no LoRA to start from ({first_line(error)})") from error
    config = player.config
    scale = 1.0 if config.lora_alpha is None else config.lora_alpha / config.rank
    # PEFT's own files say their scale in the header, by which ours are multiplied already.
    if alpha := told.get(f"{component}.lora_alpha"):
        scale *= told[f"{component}.r"] / alpha
    found = {}
    for key, value in state.items():
        if not (match := re.fullmatch(rf"{component}\.(.+)\.(lora_[AB])\.weight", key)):
            raise ValueError(f"{source} has no LoRA of the {component} by PEFT's names: give the folder of one.")
        layer, factor = match.groups()
        found[f"network.{layer}.{factor}.default.weight"] = value / scale if factor == "lora_B" else value
    return found
