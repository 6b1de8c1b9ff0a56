"""Attachments: what weights alone cannot hold, as a folder that this library loads beside a base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sublimate.pipelines.cards import CARD_FILE, inherited_license, model_card, public_name
from sublimate.pipelines.checkpoints import read_json
from sublimate.pipelines.folders import written_aside
from sublimate.pipelines.locations import DEFAULTS_FILE
from sublimate.pipelines.model import Model

ATTACHMENT_FILE = "attachment.safetensors"


@dataclass(frozen=True)
class Attachment:
    """What a folder of an attachment holds.

    Attributes:
        name: what kind of attachment it is ("discriminator_guidance", "speedupnet").
        options: what its module is built from; JSON values.
        tensors: its weights by name, float32.
        record: the whole `sublimate.json`, provenance included.
    """

    name: str
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]

    def load_into(self, module: nn.Module) -> None:
        """Copies the weights into a module built from `options`.

        Raises:
            ValueError: when names or shapes do not match one to one.
        """
        own = module.state_dict()
        wrong = sorted(
            name
            for name in own.keys() | self.tensors.keys()
            if name not in own or name not in self.tensors or own[name].shape != self.tensors[name].shape
        )
        if wrong:
            raise ValueError(
                f"This {self.name} does not fit the model: {len(wrong)} weights differ, such as {wrong[0]!r}. "
                "Use it with the base it was made for."
            )
        module.load_state_dict(dict(self.tensors))


def export_attachment(
    model: Model,
    module: nn.Module,
    folder: str | Path,
    *,
    name: str,
    options: Mapping[str, Any],
    usage: str,
    summary: str,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `attachment.safetensors`, `sublimate.json` and a model card.

    Args:
        model: the base it was made for.
        module: its weights.
        folder: where to write; an earlier export there is replaced once the new one is complete.
        name: what kind of attachment it is.
        options: what the module is built from; JSON values.
        usage: Python code that loads and uses it, for the card.
        summary: one or two sentences for the card.
        provenance: how it was made; JSON values.

    Returns:
        The folder.

    Raises:
        ValueError: when the folder holds something else.
    """
    base = {"source": public_name(model.source), "content_hash": model.content_hash()}
    record = {"kind": "attachment", "name": name, "options": dict(options)}
    made = json.loads(json.dumps({**(provenance or {}), "base": base}))
    tensors = {key: value.detach().float().cpu().contiguous().clone() for key, value in module.state_dict().items()}
    card = model_card(
        title=name.replace("_", " ").capitalize(),
        kind="attachment",
        summary=summary,
        usage=usage,
        base=model.source,
        provenance=made,
        license=inherited_license(model.folder),
    )
    with written_aside(Path(folder), ATTACHMENT_FILE) as aside:
        save_file(tensors, aside / ATTACHMENT_FILE, {"format": "pt", "name": name, "options": json.dumps(options)})
        (aside / DEFAULTS_FILE).write_text(json.dumps({**record, "provenance": made}, indent=2, sort_keys=True) + "\n")
        (aside / CARD_FILE).write_text(card, encoding="utf-8")
    return Path(folder)


def read_attachment(folder: str | Path, name: str) -> Attachment:
    """Reads an attachment of one kind.

    Args:
        folder: what `export_attachment` wrote.
        name: the kind that is expected.

    Raises:
        ValueError: when there is none, it is damaged or of another kind.
    """
    path = Path(folder) / ATTACHMENT_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no attachment: give a folder with {ATTACHMENT_FILE}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}): export it again.") from error
    if header.get("name") != name:
        raise ValueError(f"{folder} holds a {header.get('name')}, not a {name}.")
    return Attachment(name, json.loads(header["options"]), tensors, read_json(Path(folder) / DEFAULTS_FILE))
