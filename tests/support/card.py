"""An accelerator that is not there: its tensors hold others of the CPU, and meet those no more than a GPU's may.

Operations are the CPU's, so that what runs on it must say what it says on the CPU, but for the order of sums.
For processes of their own: torch keeps the card's name for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
# What copies from one device to another, also to where only numbers are.
COPIES = (aten._to_copy.default, aten.copy_.default)
# Their indices may come from the CPU.
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Backend(_DummyBackendModule):
    """What torch asks of a device's module."""

    def get_rng_state(self, device: object = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = 0) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class OnCard(Tensor):
    """A tensor of the card.

    Attributes:
        held: what it is on the CPU.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnCard:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            held.stride(),
            held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device("card", 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return dispatched(func, args, kwargs or {})


def is_card(device: Any) -> bool:
    """Whether a device, or its name, is the card."""
    return device is not None and torch.device(device).type == "card"


def dispatched(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation on the card, or between it and the CPU where that is allowed."""
    tensors = [a for a in tree_iter((args, kwargs)) if isinstance(a, Tensor)]
    there = [t for t in tensors if isinstance(t, OnCard)]
    here = [t for t in tensors if not isinstance(t, OnCard) and t.ndim]
    if func in INDEXING and isinstance(args[0], OnCard):
        here = [t for t in here if t.dtype not in (torch.int64, torch.bool)]
    if there and here and func not in COPIES:
        found = ", ".join(f"{tuple(t.shape)} on {t.device.type}" for t in tensors)
        raise RuntimeError(f"Expected all tensors of {func} to be on one device, but found {found}.")
    asked = kwargs.get("device")
    onto = is_card(asked) if asked is not None else bool(there)
    if func is aten.copy_.default:
        onto = isinstance(args[0], OnCard)
    if onto and kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a generator of the card for {func}, but found one of the CPU.")
    known = {id(t.held): t for t in there}
    args, kwargs = tree_map(lambda a: a.held if isinstance(a, OnCard) else a, (args, kwargs))
    if is_card(asked):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*args, **kwargs)
    if not onto:
        return out
    # What an operation changed in place is what it was.
    return tree_map(lambda a: (known[id(a)] if id(a) in known else OnCard(a)) if type(a) is Tensor else a, out)


class MadeThere(TorchDispatchMode):
    """Makes tensors on the card, and moves them to it, where it is named."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        return dispatched(func, args, kwargs) if is_card(kwargs.get("device")) else func(*args, **kwargs)


class PythonNumbers(TorchFunctionMode):
    """What goes between tensors and Python's or numpy's numbers beneath the reach of a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and is_card(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]), *args[2:])
        if func is Tensor.numpy and isinstance(args[0], OnCard):
            raise TypeError("can't convert a tensor of the card to numpy: move it to the CPU first.")
        if func is Tensor.tolist and isinstance(args[0], OnCard):
            args = (args[0].cpu(),)
        return func(*args, **kwargs)


# Before anything goes backward: torch then counts the devices that there are.
_setup_privateuseone_for_python_backend("card", Backend())


@contextmanager
def card() -> Iterator[torch.device]:
    """The card, which accelerate trains on within."""
    device = torch.device("card", 0)
    with (
        MadeThere(),
        PythonNumbers(),
        mock.patch.object(Accelerator, "device", property(lambda _: device)),
    ):
        yield device
