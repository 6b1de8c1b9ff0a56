"""Full players over several processes with FSDP2: each process holds its share of what trains.

Weights, gradients, Adam's moments and moving averages are cut along their first dimension, and a block's weights are
gathered for its own forward and backward pass (Zhao et al. 2023, arXiv 2304.11277). The frozen base, and LoRA players
over it, stay whole in every process. `accelerate launch` asks for it with a configuration of FSDP version 2, in which
accelerate itself takes one model only: players are sharded here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from sublimate.diffusion.denoisers import Denoiser
from sublimate.training.objective import Objective
from sublimate.training.players import Player
from sublimate.training.whole import whole

# What a launcher may ask for besides, and what holds here: accelerate's environment, the value, what to write instead.
_FIXED = {
    "FSDP_VERSION": ("2", "fsdp_version: 2"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "fsdp_reshard_after_forward: true"),
    "FSDP_OFFLOAD_PARAMS": ("false", "fsdp_offload_params: false"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "false",
        "fsdp_activation_checkpointing: false (the run's own option is trainer.gradient_checkpointing)",
    ),
}


def sharding_asked() -> bool:
    """Whether the launcher asks for sharded players.

    Raises:
        ValueError: when it asks for what is not done: another version of FSDP, or options of it.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or not torch.distributed.is_initialized():
        return False
    for variable, (value, instead) in _FIXED.items():
        if (found := os.environ.get(variable, value)).lower() != value:
            raise ValueError(f"The launcher sets {variable}={found}: write {instead} under fsdp_config.")
    return True


def shard_players(objective: Objective, device: torch.device) -> list[ShardedTree]:
    """Shards every full player, on its device already, over all processes; LoRA players stay whole.

    Raises:
        ValueError: when the objective, or masks of weights, do not allow it.
    """
    full = {name: player for name, player in objective.players().items() if player.config.kind == "full"}
    if full and not objective.shardable:
        raise ValueError(
            f"{objective.describe()['method']} reads a full player's weights beside calling it, so they cannot be "
            "sharded: launch it with configs/accelerate/ddp.yaml, or train a LoRA."
        )
    for name, player in full.items():
        if player.config.use_8bit_adam:
            raise ValueError(f"8-bit moments of {name} cannot be sharded: set its use_8bit_adam to false.")
        if player.masked:
            raise ValueError(f"Masked weights of {name} cannot be sharded: launch with configs/accelerate/ddp.yaml.")
        if not all(p.is_contiguous() for p in player.trainable().values()):
            raise ValueError(f"Convolutions of {name} with channels last cannot be sharded: leave out channels_last.")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    return [ShardedTree(player, mesh) for player in full.values()]


class ShardedTree:
    """A player's module tree between being sharded and being whole again.

    Args:
        player: its trainable parameters are sharded in place; those it shares with others stay as they are.
        mesh: of the processes, one dimension.
    """

    def __init__(self, player: Player, mesh: DeviceMesh) -> None:
        modules = dict.fromkeys(player.module.modules())
        trained = {id(p) for p in player.trainable().values()}
        self._places = [
            (module, name, p)
            for module in modules
            for name, p in module._parameters.items()
            if p is not None and id(p) in trained
        ]
        before = {module: (type(module), _held(module)) for module in modules}
        kept = {p for p in player.module.parameters() if id(p) not in trained}
        for module in _groups(player.module, trained):
            # After every pass, the root's too: an optimiser moves shards, and weights left gathered would be old ones.
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        # Torch has no way back: what it put on the modules is noted, and taken off at the end.
        self._added = [
            (module, kind, [(now, now.keys() - keys) for now, keys in held]) for module, (kind, held) in before.items()
        ]
        for _, _, parameter in self._places:
            parameter.data = torch.empty(0, device=parameter.device)

    def end(self) -> None:
        """Makes the tree what it was, whole in every process: the same modules and parameters. All must take part."""
        for module, name, parameter in self._places:
            parameter.data = whole(module._parameters[name])  # type: ignore[arg-type]
            module._parameters[name] = parameter
        for module, kind, added in self._added:
            module.__class__ = kind
            for held, keys in added:
                for key in keys:
                    del held[key]


def _held(module: nn.Module) -> list[tuple[dict[Any, Any], set[Any]]]:
    """Where a module's attributes and its hooks of every kind are held, and their keys now."""
    hooks = [held for name, held in vars(module).items() if "_hooks" in name and isinstance(held, dict)]
    return [(held, set(held)) for held in (vars(module), *hooks)]


def _groups(module: nn.Module, trained: set[int]) -> Iterator[nn.Module]:
    """The modules whose parameters are gathered together, inner ones first.

    They are the blocks that diffusers does not split, the entries of a network's lists, and the network.
    """
    # A denoiser gives a `Prediction`, in which torch finds no tensors to put its hooks on; its network gives tensors.
    root = module.network if isinstance(module, Denoiser) else module
    chosen: set[nn.Module] = {root}
    for network in (part for part in root.modules() if isinstance(part, ModelMixin)):
        whole_blocks = set(getattr(network, "_no_split_modules", None) or ())
        chosen |= {part for part in network.modules() if type(part).__name__ in whole_blocks}
        chosen |= {entry for held in network.children() if isinstance(held, nn.ModuleList) for entry in held}
    for part in reversed(list(root.modules())):
        if part in chosen and any(id(p) in trained for p in part.parameters()):
            yield part
