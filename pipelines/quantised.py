"""Quantised networks: whose weights are integers, or tensors of a class of their own, and stay as they are.

Libraries differ in how they hold them (bitsandbytes and GGUF as packed integers, torchao and quanto as subclasses of
tensors, scales as buffers or in objects beside the weight). What is told here does not depend on the library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_quantised(tensor: Tensor) -> bool:
    """Whether a parameter is no plain tensor of floating-point numbers."""
    return not tensor.is_floating_point() or is_traceable_wrapper_subclass(tensor)


def has_quantised(module: nn.Module) -> bool:
    """Whether a network has quantised weights."""
    return any(map(is_quantised, module.parameters()))


def check_unquantised(parameters: Mapping[str, Tensor], what: str) -> None:
    """Refuses to change quantised weights.

    Args:
        parameters: by name.
        what: what would change them, as the beginning of a sentence.

    Raises:
        ValueError: when one of them is quantised, naming it.
    """
    for name, parameter in parameters.items():
        if is_quantised(parameter):
            raise ValueError(
                f"{what} changes {name}, which is quantised: open a checkpoint that is not, or train a LoRA over this "
                "one (kind=lora) where the method has that."
            )


def held_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer, and what quantised layers hold beside them: scales, codes, packed weights."""
    yield from module.parameters()
    yield from module.buffers()
    for layer in module.modules():
        if any(map(is_quantised, layer.parameters(recurse=False))):
            own = [value for name, value in vars(layer).items() if not name.startswith("_")]
            weights = layer.parameters(recurse=False)
            yield from _tensors([*own, *(value for weight in weights for value in vars(weight).values())])


def plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor under its name, or the plain ones that a tensor of a class of its own consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(f"{name}.{part}", getattr(tensor, part))


def precision_of(module: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The precision of a weight in a network of `dtype`: float32 for what overflows there, such as T5's `wo`.

    transformers opens text encoders so: its classes list, as patterns, what stays float32 in float16, and what does in
    bfloat16 too.

    Args:
        module: the network.
        name: of its parameter or buffer.
        dtype: of the network.
    """
    patterns: list[str] = []
    if dtype == torch.float16:
        patterns += getattr(module, "_keep_in_fp32_modules", None) or ()
    if dtype in (torch.float16, torch.bfloat16):
        patterns += getattr(module, "_keep_in_fp32_modules_strict", None) or ()
    return torch.float32 if any(re.search(p.replace("*", ".*"), name) for p in patterns) else dtype


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives all weights of a network one precision, in place, but for `precision_of`; quantised ones keep theirs."""
    mixed = any(precision_of(module, name, dtype) != dtype for name, _ in module.named_parameters())
    if not mixed and not has_quantised(module):
        # diffusers warns about every conversion, so only what needs one is converted.
        if any(p.dtype != dtype for p in module.parameters()):
            module.to(dtype=dtype)
        return
    # diffusers refuses to convert a network that has quantised ones.
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not is_quantised(tensor):
            tensor.data = tensor.data.to(precision_of(module, name, dtype))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
            yield from (part for part in vars(value).values() if isinstance(part, Tensor))
