"""Which of a denoiser's weights a fine-tuning eraser trains, whole or by a LoRA, and the changes that come of it."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sublimate.erasure.eraser import Changes
from sublimate.erasure.weights import Rule, select
from sublimate.pipelines.model import Model
from sublimate.training.players import Player, PlayerConfig, make_player
from sublimate.training.randomness import key


def denoiser_player(
    model: Model,
    rule: Rule,
    *,
    learning_rate: float,
    lora_rank: int | None = None,
    lora_alpha: int | None = None,
    seed: int = 0,
) -> Player:
    """The selected weights in a copy of the denoiser that shares all others with the model, or a LoRA over them.

    Args:
        model: stays as it is.
        rule: which weights. Of these a LoRA takes the linear layers'; the others stay as they are.
        learning_rate: of Adam, without weight decay.
        lora_rank: of every layer's change; None trains the weights themselves.
        lora_alpha: the LoRA's scale, times the rank; None is the rank.
        seed: of the LoRA's first factors, which change nothing yet.

    Raises:
        ValueError: when the rule names no weights, or none of a linear layer where those are needed.
    """
    network, chosen = model.denoiser.network, select(model.denoiser.network, rule)
    if lora_rank is None:
        options = PlayerConfig(learning_rate=learning_rate, adam_weight_decay=0.0)
        return make_player(model.denoiser, options, names=(f"network.{name}" for name in chosen))
    linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    layers = tuple(f"network.{name}" for name in linear if f"{name}.weight" in chosen)
    if not layers:
        raise ValueError(
            f"The weights rule {rule!r} of {model.source} names no linear layer, as a LoRA needs: leave out lora_rank."
        )
    options = PlayerConfig(
        kind="lora",
        rank=lora_rank,
        lora_alpha=lora_alpha,
        target_modules=layers,
        learning_rate=learning_rate,
        adam_weight_decay=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "lora"))
        return make_player(model.denoiser, options)


def denoiser_changes(model: Model, player: Player) -> Changes:
    """What training made of the weights: new values, or, of a LoRA, changes of low rank with its scale in them."""
    if player.config.kind == "full":
        trained = player.trainable()
        return Changes({full: trained[name].detach() for name, full in full_keys(model, player).items()})
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in player.module.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.active_adapters
            a, b = (factors[adapter].weight.detach() for factors in (layer.lora_A, layer.lora_B))
            found[_full_key(model, f"{name}.weight")] = layer.scaling[adapter] * b, a
    return Changes(low_rank=found)


def full_keys(model: Model, player: Player) -> dict[str, str]:
    """The full parameter key of every weight of the denoiser that a player trains, by its name in the player."""
    return {name: _full_key(model, name) for name in player.trainable()}


def _full_key(model: Model, name: str) -> str:
    return f"{model.backbone.network_attribute}/{name.removeprefix('network.')}"
