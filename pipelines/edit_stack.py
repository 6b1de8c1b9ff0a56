"""The edits a model carries: an ordered stack over the pristine originals of every parameter they touch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sublimate.pipelines.model import weights_hash
from sublimate.pipelines.quantised import check_unquantised, precision_of

if TYPE_CHECKING:
    from sublimate.pipelines.edit import Edit
    from sublimate.pipelines.edit_attachment import InstalledAttachment
    from sublimate.pipelines.model import Model


class EditStack:
    """Edits in the order they were applied, and the tensors they replaced, bit by bit.

    Subtracting a delta does not undo adding it in floating point, so every change is computed anew from the originals.
    Parameters are written in place: whoever shares their storage sees the edit too.

    Args:
        model: the model that carries the edits.
    """

    def __init__(self, model: Model) -> None:
        self.edits: list[Edit] = []
        self.pristine: dict[str, Tensor] = {}
        self.installed: dict[Edit, InstalledAttachment] = {}
        self.base_hash = model.content_hash()

    def base_hash_in(self, model: Model, dtype: torch.dtype) -> str:
        """The hash that the unedited weights have where the checkpoint is opened in another precision."""
        pristine = {own_key(model, key): tensor for key, tensor in self.pristine.items()}

        def there(key: str) -> torch.dtype:
            component, _, name = key.partition("/")
            return precision_of(model.component(component), name, dtype)

        return weights_hash((key, tensor.to(there(key))) for key, tensor in model.tensors(pristine).items())

    def push(self, model: Model, edit: Edit) -> None:
        """Puts an edit on top and writes what it touches.

        Raises:
            ValueError: when the edit is already on the stack, does not fit the model, or changes quantised weights.
        """
        if any(edit is other for other in self.edits):
            raise ValueError("This edit is already applied to this model: remove it before applying it again.")
        parameters = {key: parameter_of(model, key, shape) for key, shape in edit.shapes().items()}
        check_unquantised(parameters, "The edit")
        self._check_spelling(model, parameters)
        originals = {k: p.detach().to("cpu", copy=True) for k, p in parameters.items() if k not in self.pristine}
        if edit.attachment is not None:
            self.installed[edit] = edit.attachment.install(model)
        self.pristine |= originals
        self._rebuild(parameters, [*self.edits, edit])

    def remove(self, model: Model, edit: Edit) -> None:
        """Takes an edit out from wherever it is; the others stay as if it had never been there.

        Raises:
            ValueError: when the edit is not on the stack.
        """
        if not any(edit is other for other in self.edits):
            raise ValueError("This edit is not applied to this model, so there is nothing to remove.")
        parameters = {key: parameter_of(model, key, shape) for key, shape in edit.shapes().items()}
        if edit in self.installed:
            self.installed.pop(edit).remove(model)
        self._rebuild(parameters, [other for other in self.edits if other is not edit])
        still = {key for other in self.edits for key in other.shapes()}
        self.pristine = {key: tensor for key, tensor in self.pristine.items() if key in still}

    def _check_spelling(self, model: Model, parameters: Mapping[str, nn.Parameter]) -> None:
        """Edits add up by key, so one parameter has to have one."""
        taken = {id(parameter_of(model, key, tensor.shape)): key for key, tensor in self.pristine.items()}
        for key, parameter in parameters.items():
            if (other := taken.setdefault(id(parameter), key)) != key:
                raise ValueError(
                    f"{key} and {other} are one parameter, in edits made with different releases of transformers: "
                    "apply one of them, or make it again."
                )

    def _rebuild(self, parameters: Mapping[str, nn.Parameter], edits: list[Edit]) -> None:
        """Writes what `edits` make of the parameters; everything is computed before anything is touched."""
        values = {key: merged(self.pristine[key], key, edits) for key in parameters}
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(values[key])
        self.edits = edits


def merged(original: Tensor, key: str, edits: Iterable[Edit]) -> Tensor:
    """What `edits`, in order, make of a parameter: a value replaces what was there, a low-rank delta adds to it.

    Low-rank deltas are summed in float64 and rounded once; a key that no edit touches comes back as it is.
    """
    result = original
    for edit in edits:
        if key in edit.values:
            result = edit.values[key]
        elif key in edit.low_rank:
            b, a = edit.low_rank[key]
            result = result.to("cpu", torch.float64) + b.double() @ a.double()
    return result.to(original.dtype)


def parameter_of(model: Model, key: str, shape: torch.Size) -> nn.Parameter:
    """The model's parameter of a full key such as "unet/conv_in.weight".

    Raises:
        ValueError: when the model has no such component or parameter, or its shape is another.
    """
    component, _, name = own_key(model, key).partition("/")
    parameter = model.component(component).get_parameter(name)
    if parameter.shape != shape:
        raise ValueError(
            f"{key} has shape {tuple(parameter.shape)} in the model {model.source} and {tuple(shape)} in the edit: "
            "the edit belongs to another architecture."
        )
    return parameter


def own_key(model: Model, key: str) -> str:
    """A parameter's key as this model spells it: some releases of transformers put a wrapper around text models.

    Raises:
        ValueError: when the model has no such component or parameter.
    """
    component, _, name = key.partition("/")
    for spelling in (name, name.removeprefix("text_model."), f"text_model.{name}"):
        try:
            model.component(component).get_parameter(spelling)
        except (AttributeError, ValueError):
            continue
        return f"{component}/{spelling}"
    raise ValueError(f"The model {model.source} has no parameter {key}: the edit belongs to another architecture.")


_STACKS: WeakKeyDictionary[Model, EditStack] = WeakKeyDictionary()


def stack_of(model: Model) -> EditStack | None:
    """The model's stack, or None while it carries no edit."""
    return _STACKS.get(model)


def differs_from_disk(model: Model) -> bool:
    """Whether the model carries edits, or LoRAs, that the checkpoint it was opened from does not."""
    return stack_of(model) is not None or bool(model.loras)


def open_stack(model: Model) -> EditStack:
    """The model's stack, made on first use; it then remembers the hash of the unedited weights."""
    if (stack := _STACKS.get(model)) is None:
        stack = _STACKS[model] = EditStack(model)
    return stack


def close_stack(model: Model) -> None:
    """Forgets a stack that carries no edit any more, so that later training of the model is its new pristine state."""
    if (stack := _STACKS.get(model)) is not None and not stack.edits:
        del _STACKS[model]
