"""What an edit carries where weights cannot hold it: a kind, options and tensors, installed as forward hooks."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sublimate.pipelines import attached

if TYPE_CHECKING:
    from sublimate.pipelines.model import Model

Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]
"""(module, its positional inputs, its output) -> what takes the output's place; None leaves the very same output."""


@dataclass(frozen=True)
class Built:
    """What a kind makes of its options and tensors for one model.

    Attributes:
        module: holds the tensors, in float32; it follows the model to its device, and hooks read them from it.
        hooks: forward hooks by the full name of a module of the model, "text_encoder/encoder.layers.0". They take and
            return the model's precision, and let gradients through.
    """

    module: nn.Module
    hooks: Mapping[str, Hook]


Build = Callable[["Model", Mapping[str, Any], Mapping[str, Tensor]], Built]
"""A kind: (model, options, tensors) -> Built; it changes nothing, and raises ValueError when they do not fit."""


@dataclass(frozen=True, eq=False)
class EditAttachment:
    """A part of an edit that runs beside the weights.

    Attributes:
        kind: name of a file in `pipelines/attached/`, whose `build` makes hooks of the rest.
        options: JSON values.
        tensors: by name, float32.

    Raises:
        ValueError: when a tensor is not finite.
        TypeError: when the options are not JSON.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} of the attachment {self.kind} is not finite: it would destroy the model.")
        copies = {name: t.detach().to("cpu", torch.float32, copy=True) for name, t in self.tensors.items()}
        object.__setattr__(self, "tensors", copies)
        object.__setattr__(self, "options", json.loads(json.dumps(dict(self.options))))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over kind, options and tensors."""
        digest = hashlib.sha256(f"{self.kind}:{json.dumps(self.options, sort_keys=True)}".encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}:{tuple(tensor.shape)}:".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def install(self, model: Model) -> InstalledAttachment:
        """Puts it on a model; those that the model has already act before it.

        Raises:
            ValueError: when this version does not know the kind, or it does not fit the model. Nothing has been
                touched then.
        """
        built = _kind(self.kind)(model, self.options, self.tensors)
        modules = {name: _module_of(model, name, self.kind) for name in built.hooks}
        built.module.to(model.device).requires_grad_(False).eval()
        handles = [modules[name].register_forward_hook(_marked(self.kind, h)) for name, h in built.hooks.items()]
        installed = InstalledAttachment(self, built.module, tuple(handles))
        model.attached.append(installed)
        return installed


@dataclass(frozen=True, eq=False)
class InstalledAttachment:
    """An attachment in its place in a model: the module that holds its tensors there, and its hooks' handles."""

    attachment: EditAttachment
    module: nn.Module
    handles: tuple[RemovableHandle, ...]

    def remove(self, model: Model) -> None:
        """Takes it out again; copies of networks that were made meanwhile keep it."""
        for handle in self.handles:
            handle.remove()
        model.attached.remove(self)


def attached_kinds(network: nn.Module) -> list[str]:
    """The kinds of attachment that act in a network, or in what it was copied from when it was copied."""
    hooks = (hook for module in network.modules() for hook in module._forward_hooks.values())
    return sorted({hook.attachment_kind for hook in hooks if hasattr(hook, "attachment_kind")})


@contextlib.contextmanager
def detached(model: Model) -> Iterator[None]:
    """The model without what is attached, within this context; the very same hooks act afterwards, in their order."""
    attached, taken = model.attached, []
    for handle in (handle for installed in attached for handle in installed.handles):
        hooks = cast(dict[int, Any], handle.hooks_dict_ref())
        taken.append((hooks, handle.id, hooks.pop(handle.id)))
    model.attached = []
    try:
        yield
    finally:
        model.attached = attached
        for hooks, key, hook in taken:
            hooks[key] = hook


def strip(network: nn.Module) -> None:
    """Takes every attachment out of a copy for good; what it was copied from keeps its own."""
    for module in network.modules():
        hooks = module._forward_hooks
        for key in [key for key, hook in hooks.items() if hasattr(hook, "attachment_kind")]:
            del hooks[key]


def refuse_attached(model: Model, *networks: nn.Module) -> None:
    """Refuses what can only be written as a folder of stock classes.

    Args:
        model: what is written.
        networks: others that are written with it.

    Raises:
        ValueError: when it carries an attachment.
    """
    if kinds := sorted(
        {kind for network in (*model.components().values(), *networks) for kind in attached_kinds(network)}
    ):
        raise ValueError(
            f"{model.source} carries the attachment {', '.join(kinds)}, which stock diffusers cannot hold: take that "
            "edit off first, and apply its file to what is opened from the folder."
        )


def _marked(kind: str, call: Hook) -> Hook:
    # A plain function, which deepcopy leaves as it is: copies of a hooked network (players) share the attachment.
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return call(module, inputs, output)

    cast(Any, hook).attachment_kind = kind
    return hook


def _kind(name: str) -> Build:
    known = sorted(module.name for module in pkgutil.iter_modules(attached.__path__))
    if name not in known:
        raise ValueError(
            f"This version knows no attachment of the kind {name!r}, only {', '.join(known) or 'none'}: "
            "update sublimate."
        )
    return importlib.import_module(f"{attached.__name__}.{name}").build


def _module_of(model: Model, full_name: str, kind: str) -> nn.Module:
    component, _, name = full_name.partition("/")
    try:
        return model.component(component).get_submodule(name)
    except (AttributeError, ValueError):
        raise ValueError(
            f"{model.source} has no module {full_name}: the attachment {kind} belongs to another architecture."
        ) from None
