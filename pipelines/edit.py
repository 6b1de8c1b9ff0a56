"""Edit: a change to a model as a thing of its own, which applies, removes, composes and travels as one file."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sublimate.pipelines.checkpoints import refuse_pickle
from sublimate.pipelines.edit_attachment import EditAttachment
from sublimate.pipelines.edit_stack import EditStack, close_stack, merged, open_stack, own_key, parameter_of, stack_of
from sublimate.pipelines.export import save_model
from sublimate.pipelines.folders import file_written_aside
from sublimate.pipelines.model import Model, open_model
from sublimate.pipelines.quantised import held_tensors

FORMAT = "sublimate.edit"
ROUNDED = ("bfloat16", "float16")
"""The precisions that round a checkpoint's weights when it is opened in them."""
_ATTACHED = "attachment/"


@dataclass(frozen=True, eq=False)
class Edit:
    """New values for some of a model's parameters, what weights cannot hold, and where both come from.

    Keys are full names, component first: "unet/down_blocks.0.….to_k.weight".

    Attributes:
        values: the new tensor per replaced parameter, float32.
        low_rank: for parameters whose change is exactly B A: (B, A), shapes (d_out, rank) and (rank, d_in), float32.
        provenance: JSON values; erasers fill in base (source, content hash, and its precision unless float32), method,
            paper, config, request, seed and versions.
        attachment: what runs beside the weights; stock diffusers cannot hold it, so such an edit is neither folded nor
            made a LoRA.

    Raises:
        ValueError: when the edit is empty, names a key twice, or holds numbers that are not finite.
        TypeError: when the provenance is not JSON.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    low_rank: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    attachment: EditAttachment | None = None

    def __post_init__(self) -> None:
        values = {key: _float32(key, value) for key, value in self.values.items()}
        low_rank = {key: (_float32(key, b), _float32(key, a)) for key, (b, a) in self.low_rank.items()}
        if not values and not low_rank and self.attachment is None:
            raise ValueError("An edit must touch at least one parameter or carry an attachment.")
        if twice := sorted(values.keys() & low_rank.keys()):
            raise ValueError(f"{twice[0]} has both a new value and a low-rank change: give one of them.")
        for key, (b, a) in low_rank.items():
            if b.dim() != 2 or a.dim() != 2 or b.shape[1] != a.shape[0]:
                raise ValueError(f"The factors of {key} do not multiply: {tuple(b.shape)} and {tuple(a.shape)}.")
        for key in values.keys() | low_rank.keys():
            if not all(key.partition("/")):
                raise ValueError(f"{key!r} is not a full parameter name: write it as component/parameter.")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "low_rank", low_rank)
        object.__setattr__(self, "provenance", json.loads(json.dumps(dict(self.provenance))))

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter the edit touches, by full key."""
        shapes = {key: value.shape for key, value in self.values.items()}
        return shapes | {key: torch.Size((len(b), a.shape[1])) for key, (b, a) in self.low_rank.items()}

    def apply(self, model: Model, *, allow_other_base: bool = False) -> None:
        """Puts the edit on top of those the model carries already; values of later edits win, low-rank changes add up.

        Args:
            model: changed in place; `remove` restores every bit. Its attachment acts after those of earlier edits.
            allow_other_base: apply to a model other than the one the edit was made for.

        Raises:
            ValueError: when the model lacks a parameter or has it in another shape, is another base, or carries this
                edit already, or the attachment does not fit. Nothing has been touched then.
        """
        stack = open_stack(model)
        try:
            if not allow_other_base:
                self._check_base(model, stack)
            stack.push(model, self)
        finally:
            close_stack(model)

    def remove(self, model: Model) -> None:
        """Takes the edit out of the model, in whatever order edits were applied.

        Raises:
            ValueError: when the model does not carry this edit.
        """
        if (stack := stack_of(model)) is None:
            raise ValueError("This edit is not applied to this model, so there is nothing to remove.")
        stack.remove(model, self)
        close_stack(model)

    @contextlib.contextmanager
    def applied(self, model: Model, *, allow_other_base: bool = False) -> Iterator[Model]:
        """Within this context the model carries the edit."""
        self.apply(model, allow_other_base=allow_other_base)
        try:
            yield model
        finally:
            self.remove(model)

    @staticmethod
    def compose(edits: Sequence[Edit]) -> Edit:
        """One edit that does what the given ones do in this order.

        Args:
            edits: edits of one base.

        Raises:
            ValueError: when there is none, their bases differ, or several carry an attachment.
        """
        if not edits:
            raise ValueError("There is nothing to compose: give at least one edit.")
        bases = [edit.provenance.get("base") for edit in edits]
        for base in bases[1:]:
            if (base or {}).get("content_hash") != (bases[0] or {}).get("content_hash"):
                raise ValueError(f"Edits of different bases do not compose: {_name(bases[0])} and {_name(base)}.")
        attachments = [edit.attachment for edit in edits if edit.attachment is not None]
        if len(attachments) > 1:
            kinds = " and ".join(attachment.kind for attachment in attachments)
            raise ValueError(f"One edit holds one attachment, not {kinds}: apply these edits one after the other.")
        values: dict[str, Tensor] = {}
        low_rank: dict[str, tuple[Tensor, Tensor]] = {}
        for edit in edits:
            for key, value in edit.values.items():
                values[key] = value
                low_rank.pop(key, None)
            for key, (b, a) in edit.low_rank.items():
                if key in values:
                    values[key] = merged(values[key], key, [edit])
                elif key in low_rank:
                    low_rank[key] = (torch.cat([low_rank[key][0], b], 1), torch.cat([low_rank[key][1], a]))
                else:
                    low_rank[key] = (b, a)
        parts = [dict(edit.provenance) for edit in edits]
        provenance = {"base": bases[0], "composed": parts} if bases[0] else {"composed": parts}
        return Edit(values, low_rank, provenance, attachments[0] if attachments else None)

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, complete under its name or not at all; its header carries the provenance.

        Raises:
            ValueError: when the name does not end in .safetensors.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"An edit is a .safetensors file, got the name {path.name}.")
        tensors = {key: value.contiguous() for key, value in self.values.items()}
        for key, (b, a) in self.low_rank.items():
            tensors |= {f"{key}.lora_B": b.contiguous(), f"{key}.lora_A": a.contiguous()}
        metadata = {
            "format": FORMAT,
            "format_version": "1" if self.attachment is None else "2",
            "low_rank": json.dumps(sorted(self.low_rank)),
            "provenance": json.dumps(self.provenance, sort_keys=True),
        }
        if self.attachment is not None:
            tensors |= {f"{_ATTACHED}{name}": t.contiguous() for name, t in self.attachment.tensors.items()}
            described = {"kind": self.attachment.kind, "options": self.attachment.options}
            metadata["attachment"] = json.dumps(described, sort_keys=True)
        with file_written_aside(path) as aside:
            save_file(tensors, aside, metadata)
        return path

    @staticmethod
    def load(path: str | Path) -> Edit:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is a pickle, damaged, or another kind of safetensors file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no edit file {path}.")
        refuse_pickle(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file ({error}).") from error
        if metadata.get("format") != FORMAT or metadata.get("format_version") not in ("1", "2"):
            raise ValueError(
                f"{path} holds tensors but is not an edit of format version 1 or 2 that `Edit.save` wrote."
            )
        attachment = None
        if "attachment" in metadata:
            own = [name for name in tensors if name.startswith(_ATTACHED)]
            attachment = EditAttachment(
                **json.loads(metadata["attachment"]),
                tensors={name.removeprefix(_ATTACHED): tensors.pop(name) for name in own},
            )
        low_rank = {
            key: (tensors.pop(f"{key}.lora_B"), tensors.pop(f"{key}.lora_A"))
            for key in json.loads(metadata["low_rank"])
        }
        return Edit(tensors, low_rank, json.loads(metadata["provenance"]), attachment)

    def to_lora(self, model: Model, *, max_rank: int | None = None) -> dict[str, Tensor]:
        """The edit as the state dict of a LoRA, for `pipeline.load_lora_weights`; exact, or refused.

        Args:
            model: the edit's base.
            max_rank: refuse a larger rank.

        Raises:
            ValueError: when a change is not low-rank, is of another layer than a linear one, sits in a component that
                the stock pipeline loads no LoRA into, or needs a rank above `max_rank`, or the edit carries an
                attachment.
        """
        if self.attachment is not None:
            raise ValueError(
                f"This edit carries the attachment {self.attachment.kind}, which no LoRA holds: apply it."
            )
        covered = getattr(model.pipeline, "_lora_loadable_modules", ())
        for key, shape in self.shapes().items():
            if key in self.values:
                raise ValueError(f"The change of {key} is not low-rank, so no LoRA equals this edit: fold it instead.")
            parameter_of(model, key, shape)
            component, _, name = own_key(model, key).partition("/")
            layer = model.component(component).get_submodule(name.rpartition(".")[0])
            if component not in covered or not isinstance(layer, nn.Linear):
                raise ValueError(
                    f"{key} is not the weight of a linear layer that a {type(model.pipeline).__name__} loads from a "
                    "LoRA: fold the edit instead."
                )
        rank = max(len(a) for _, a in self.low_rank.values())
        if max_rank is not None and rank > max_rank:
            raise ValueError(
                f"The edit has rank {rank}, more than {max_rank}: raise the limit or fold the edit instead."
            )
        state: dict[str, Tensor] = {}
        for key, (b, a) in self.low_rank.items():
            layer_name = own_key(model, key).removesuffix(".weight").replace("/", ".", 1)
            state |= {f"{layer_name}.lora_A.weight": a, f"{layer_name}.lora_B.weight": b}
        return state

    def fold(self, model: Model, folder: str | Path, *, allow_other_base: bool = False) -> Path:
        """Writes the edited model as a whole diffusers folder of stock classes, whose card has the edit's provenance.

        Args:
            model: the edit's base; it is left as it was. Edits it carries already are written too, this one on top
                unless it is among them.
            folder: where to write; an earlier export there is replaced once the new one is complete.
            allow_other_base: as in `apply`.

        Returns:
            The folder.

        Raises:
            ValueError: when the edit does not fit the model, the folder holds something else, or this edit or one that
                the model carries has an attachment, which stock diffusers cannot hold.
        """
        stack = stack_of(model)
        carried = stack is not None and any(edit is self for edit in stack.edits)
        with contextlib.nullcontext() if carried else self.applied(model, allow_other_base=allow_other_base):
            edits, provenance = open_stack(model).edits, self.provenance
            if len(edits) > 1:
                provenance = {**provenance, "edits": [edit.provenance for edit in edits]}
            return save_model(model, folder, provenance=provenance)

    def _check_base(self, model: Model, stack: EditStack) -> None:
        base = self.provenance.get("base") or {}
        wanted, made_in = base.get("content_hash"), base.get("dtype")
        # An edit may also have been made for the model as it is now, with the edits it carries.
        if wanted == stack.base_hash or (stack.edits and wanted == model.content_hash()):
            return
        # Or for the same checkpoint, with its weights rounded to the precision in which it was open.
        if made_in in ROUNDED and wanted == stack.base_hash_in(model, getattr(torch, made_in)):
            return
        here = f"{model.source} ({stack.base_hash[:12]}{'' if model.dtype == torch.float32 else ', not in float32'})"
        raise ValueError(
            f"The edit was made for {_name(base)}, the model is {here}: "
            "pass allow_other_base=True to apply it all the same."
        )


def open_edited(
    source: str | Path, edits: Sequence[str | Path], *, dtype: torch.dtype = torch.float32, **options: Any
) -> Model:
    """Opens a checkpoint and applies edit files, in order.

    Edits belong to the checkpoint in float32: where there are some, it is opened so, and takes its precision after.

    Args:
        source: as `open_model` takes it.
        edits: files that `Edit.save` wrote.
        dtype: precision of the edited model.
        options: `open_model`'s others.

    Raises:
        ValueError: when the checkpoint does not open, or an edit is damaged or belongs to another.
    """
    loaded = [Edit.load(path) for path in edits]  # refused, if at all, before anything large is read
    model = open_model(source, dtype=torch.float32 if loaded else dtype, **options)
    for edit in loaded:
        edit.apply(model)
    return model.to(dtype=dtype)


def beside(model: Model, edit: Edit) -> Model:
    """A second model with the edit applied, which shares with the first all weights that the edit leaves alone.

    Args:
        model: stays as it is, and must as long as the second is used; without edits of its own.
        edit: of this model.

    Raises:
        ValueError: when the model carries edits, or this one does not fit it.
    """
    if stack_of(model) is not None:
        raise ValueError(f"{model.source} carries edits, which a second model would not: remove them first.")
    touched = {id(parameter_of(model, key, shape)) for key, shape in edit.shapes().items()}
    pipeline = copy.copy(model.pipeline)
    for name, module in model.components().items():
        shared = {id(tensor): tensor for tensor in held_tensors(module) if id(tensor) not in touched}
        setattr(pipeline, name, copy.deepcopy(module, shared))
    second = Model(pipeline, model.source, model.defaults, model.carried)
    second.loras, second.folder = model.loras, model.folder
    edit.apply(second)
    return second


def _float32(key: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"The edit of {key} is not finite: it would destroy the model.")
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _name(base: Mapping[str, Any] | None) -> str:
    base = base or {}
    return f"{base.get('source', 'an unnamed model')} ({str(base.get('content_hash', 'no hash'))[:12]})"
