"""Weights as quantisation libraries hold them, in torch alone: integers with scales, and a subclass of tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and one scale per row."""
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return (weight.detach() / scale).round().to(torch.int8), scale


class IntegerLinear(nn.Linear):
    """As bitsandbytes has it: an integer parameter, and an object beside it that holds the codes again, and scales."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        codes, scale = codes_of(layer.weight)
        self.weight, self.bias = nn.Parameter(codes, requires_grad=False), layer.bias
        self.state = SimpleNamespace(codes=codes, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype) * self.state.scale.to(x.dtype), self.bias)


class ScaledTensor(Tensor):
    """As torchao has it: a tensor that claims to be float32, or float16, and consists of integers and scales."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> ScaledTensor:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: None, size: Any, stride: Any) -> ScaledTensor:
        return ScaledTensor(parts["codes"], parts["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear:
            x, weight, *bias = args
            return linear(x, weight.codes.to(x.dtype) * weight.scale.to(x.dtype), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):
            return ScaledTensor(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{func} of a ScaledTensor")


def scaled_linear(layer: nn.Linear) -> nn.Linear:
    """The same layer over a `ScaledTensor` of float16."""
    twin = nn.Linear(1, 1, bias=False)
    twin.in_features, twin.out_features, twin.bias = layer.in_features, layer.out_features, layer.bias
    codes, scale = codes_of(layer.weight)
    twin.weight = nn.Parameter(ScaledTensor(codes, scale.half()), requires_grad=False)
    return twin


KINDS = {"integers": IntegerLinear, "subclass": scaled_linear}


def quantise(network: nn.Module, kind: str) -> None:
    """Quantises the linear layers of a network's attention, in place."""
    names = [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and ".to_" in n]
    for name in names:
        network.set_submodule(name, KINDS[kind](network.get_submodule(name)))
