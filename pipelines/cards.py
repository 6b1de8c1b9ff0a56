"""Model cards: what an artefact is, how to load it, and how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

CARD_FILE = "README.md"
"""The model card of a folder or of a repository of the hub."""

Kind = Literal["weights", "lora", "attachment"]

_KINDS: dict[str, str] = {
    "weights": "A complete pipeline of stock diffusers classes; it loads without this library.",
    "lora": "A LoRA for the base model, loaded by stock diffusers.",
    "attachment": "An addition that weights alone cannot hold; it is loaded by sublimate, not by stock diffusers.",
}


def model_card(
    *,
    title: str,
    kind: Kind,
    summary: str,
    usage: str,
    base: str,
    provenance: Mapping[str, Any],
    tags: tuple[str, ...] = (),
    license: str | None = None,
) -> str:
    """A Hugging Face model card.

    Args:
        title: the headline.
        kind: what the artefact is.
        summary: one or two sentences on what it does.
        usage: Python code that loads and runs it.
        base: source of the base model; named as `base_model` where it is a hub id.
        provenance: how it was made; JSON values.
        tags: more tags.
        license: identifier as the hub knows it; the base model's terms unless given.

    Returns:
        Markdown with YAML front matter.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"An artefact is one of {', '.join(_KINDS)}, not {kind!r}.")
    library = "sublimate" if kind == "attachment" else "diffusers"
    front: dict[str, Any] = {"library_name": library, "tags": ["sublimate", kind, *tags]}
    if license is None:
        front |= {"license": "other", "license_name": "as-base-model"}
    else:
        front["license"] = license
    if is_hub_id(base):
        front["base_model"] = base
        front["base_model_relation"] = "finetune" if kind == "weights" else "adapter"
    blocks = {name: value for name, value in provenance.items() if isinstance(value, str) and "\n" in value}
    rows = [f"| {name} | {_cell(value)} |" for name, value in provenance.items() if name not in blocks]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        summary,
        f"**Kind: {kind}.** {_KINDS[kind]} Base model: `{public_name(base)}`.",
        f"## How to load it\n\n```python\n{usage.strip()}\n```",
        "## How it was made\n\n| | |\n|---|---|\n" + "\n".join(rows),
        *(f"`{name}`:\n\n```yaml\n{value.rstrip()}\n```" for name, value in blocks.items()),
    ]
    if license is None:
        parts.append("## License\n\nThe base model's license and terms of use apply to this derivative.")
    return "\n\n".join(parts) + "\n"


def public_name(source: str) -> str:
    """What to call a base model in public: of a local folder its name, since its path is nobody's business."""
    return Path(source).resolve().name if Path(source).exists() else source


def public_values(value: Any) -> Any:
    """JSON values in which paths that lead out of the working folder are their last part alone: see `public_name`."""
    if isinstance(value, Mapping):
        return {key: public_values(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [public_values(one) for one in value]
    if isinstance(value, str) and "\n" not in value:
        path = Path(value)
        return path.name if path.is_absolute() or value.startswith("~") or ".." in path.parts else value
    return value


def is_hub_id(source: str) -> bool:
    """Whether a source is owner/name on the hub, and nothing on disk."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)) and not Path(source).exists()


def inherited_license(folder: Path | None) -> str | None:
    """The license that a checkpoint's own model card names, if any."""
    card = None if folder is None else folder / CARD_FILE
    if card is None or not card.is_file():
        return None
    found = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
    try:
        front = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError:
        return None
    named = front.get("license") if isinstance(front, dict) else None
    return named if isinstance(named, str) and named != "other" else None


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    return "`" + text.replace("|", "\\|").replace("`", "'").replace("\n", " ") + "`"
