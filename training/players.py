"""Players: each network that trains is one module tree with its own weights or its own adapter over a shared base.

Adapters of one tree are never switched between forward and backward: trees share the frozen base's storage instead,
so three LoRA players cost one base plus three adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, Self

import torch
from peft import LoraConfig, inject_adapter_in_model
from pydantic import Field, model_validator
from torch import nn

from sublimate.pipelines.quantised import check_unquantised, held_tensors
from sublimate.training.adam_8bit import adam_8bit
from sublimate.training.config import Config

_OF_A_LORA = {"rank", "lora_alpha", "target_modules"}
HALF = (torch.float16, torch.bfloat16)
# The linear layers of attention in diffusers' UNets and transformers.
ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class PlayerConfig(Config):
    """How one player is made and optimised.

    Attributes:
        kind: "full" trains its own copy of every weight; "lora" trains an adapter over the shared base. Said to be
            "full", it needs no other word to switch a recipe's LoRA off.
        rank: LoRA rank.
        lora_alpha: LoRA scale numerator; None means the rank (scale 1).
        target_modules: names (or endings of names) of the layers that carry adapters.
        learning_rate: peak learning rate.
        adam_beta1, adam_beta2, adam_epsilon, adam_weight_decay: AdamW's options.
        use_8bit_adam: keep AdamW's moments in 8 bits, on GPUs and with bitsandbytes (extra `8bit`).
    """

    kind: Literal["full", "lora"] = "full"
    rank: int = Field(default=64, ge=1)
    lora_alpha: int | None = Field(default=None, ge=1)
    target_modules: tuple[str, ...] = ATTENTION_PROJECTIONS
    learning_rate: float = Field(default=1e-5, gt=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    adam_weight_decay: float = Field(default=0.01, ge=0)
    use_8bit_adam: bool = False

    @model_validator(mode="after")
    def _reads_what_is_given(self) -> Self:
        given = self.model_fields_set
        if self.kind == "full" and "kind" not in given and (lora := sorted(_OF_A_LORA & given)):
            raise ValueError(f"{lora[0]} is a LoRA's: set kind to lora, or leave it out.")
        return self

    @property
    def artefact(self) -> Literal["weights", "lora"]:
        """What a player of this kind is exported as."""
        return "weights" if self.kind == "full" else "lora"


# Adam as SiD and much of adversarial training run it.
WITHOUT_MOMENTUM = PlayerConfig(adam_beta1=0.0, adam_weight_decay=0.0)


@dataclass(frozen=True)
class Player:
    """A module tree, the names of its parameters that train, their optimiser, and whether their average is kept."""

    module: nn.Module
    config: PlayerConfig
    names: frozenset[str]
    ema: bool = False

    def __post_init__(self) -> None:
        if missing := self.names - dict(self.module.named_parameters()).keys():
            raise ValueError(f"{type(self.module).__name__} has no parameters named {sorted(missing)[:5]}.")
        if not self.names:
            raise ValueError(f"No parameter of {type(self.module).__name__} is selected for training.")
        for name, parameter in self.trainable().items():
            if parameter.dtype in HALF:
                raise ValueError(f"{name} would train in {parameter.dtype}, which rounds small steps away.")
        self.module.requires_grad_(False)
        self.module.eval()

    @cached_property
    def _places(self) -> dict[str, tuple[nn.Module, str]]:
        # Walking a tree of thousands of modules takes longer than some of a GPU's work.
        paths = {name: name.rpartition(".") for name, _ in self.module.named_parameters() if name in self.names}
        return {name: (self.module.get_submodule(path), last) for name, (path, _, last) in paths.items()}

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name, in the module's order."""
        return {name: getattr(module, last) for name, (module, last) in self._places.items()}

    def set_trainable(self, on: bool) -> None:
        """Lets gradients reach the trainable parameters, or not; every other parameter is frozen."""
        for parameter in self.trainable().values():
            parameter.requires_grad_(on)

    def take_part(self, on: bool) -> None:
        """Whether the player trains now: its parameters take gradients, and its dropout drops."""
        self.set_trainable(on)
        if self.module.training != on:
            self.module.train(on)

    def restrict(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Lets only a part of the parameters train: where a mask is False the gradient is 0 from the first step on.

        Adam's moments are then 0 there too, so these entries keep every bit.

        Args:
            masks: bool, shaped like the parameters, by name; read anew in every step. Other parameters train whole.

        Raises:
            ValueError: when weight decay would move what has no gradient.
        """
        if self.config.adam_weight_decay:
            raise ValueError(f"adam_weight_decay = {self.config.adam_weight_decay} moves masked weights: set it to 0.")
        for name, parameter in self.trainable().items():
            if name not in masks:
                continue
            trains = parameter.requires_grad
            parameter.requires_grad_(True)  # tensors without gradient take no hooks
            parameter.register_hook(lambda gradient, name=name: gradient * masks[name].to(gradient.device))
            parameter.requires_grad_(trains)

    @property
    def masked(self) -> bool:
        """Whether `restrict` holds parameters back."""
        return any(parameter._backward_hooks for parameter in self.trainable().values())

    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) over the trainable parameters.

        On CUDA one kernel updates them all, which takes no memory beyond the moments.

        Raises:
            ValueError: when it is to have 8 bits and bitsandbytes is not there.
        """
        c = self.config
        parameters = list(self.trainable().values())
        fused = True if all(parameter.is_cuda for parameter in parameters) else None
        kind = adam_8bit(parameters) if c.use_8bit_adam else partial(torch.optim.AdamW, fused=fused)
        return kind(
            parameters,
            lr=c.learning_rate,
            betas=(c.adam_beta1, c.adam_beta2),
            eps=c.adam_epsilon,
            weight_decay=c.adam_weight_decay,
        )


def shared_copy(module: nn.Module) -> nn.Module:
    """A second module tree over the same storage: new modules, the very same parameters and buffers.

    Hooks, adapters and flags (gradient checkpointing) added to the copy do not touch the original.
    """
    return copy.deepcopy(module, {id(tensor): tensor for tensor in held_tensors(module)})


def make_player(
    module: nn.Module, config: PlayerConfig, *, names: Iterable[str] | None = None, ema: bool = False
) -> Player:
    """A player that starts at `module`'s weights; `module` itself stays as it is.

    Args:
        module: the frozen base, usually the teacher's denoiser.
        config: full copy or LoRA (Hu et al. 2021, arXiv 2106.09685), and the optimiser.
        names: which of the copy's parameters train; None means all. Only for `kind="full"`: of the other parameters
            the copy shares the storage, so a player that trains one layer costs one layer.
        ema: keep an exponential moving average of what trains.

    Raises:
        ValueError: when no layer or parameter matches the selection, or one to train is quantised.
    """
    if config.kind == "lora":
        if names is not None:
            raise ValueError("A LoRA player is selected by `target_modules`; `names` is for full players.")
        return _lora_player(module, config, ema)
    parameters = dict(module.named_parameters())
    chosen = frozenset(parameters if names is None else names)
    check_unquantised({name: p for name, p in parameters.items() if name in chosen}, "Training")
    frozen = (tensor for name, tensor in parameters.items() if name not in chosen)
    tree = copy.deepcopy(module, {id(tensor): tensor for tensor in frozen})
    in_float32(parameter for name, parameter in tree.named_parameters() if name in chosen)
    return Player(tree, config, chosen, ema)


def _lora_player(module: nn.Module, config: PlayerConfig, ema: bool) -> Player:
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.lora_alpha is None else config.lora_alpha,
        target_modules=list(config.target_modules),
    )
    tree = inject_adapter_in_model(lora, shared_copy(module))
    adapters = {name: parameter for name, parameter in tree.named_parameters() if ".lora_" in name}
    in_float32(adapters.values())  # PEFT gives them the precision of what they adapt
    return Player(tree, config, frozenset(adapters), ema)


def in_float32(parameters: Iterable[nn.Parameter]) -> None:
    """Gives parameters that are to train float32, in place: in half precision small steps are rounded away."""
    for parameter in parameters:
        if parameter.dtype in HALF:
            parameter.data = parameter.data.float()
