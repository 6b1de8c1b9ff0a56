"""Where configurations are found and how their YAML is read: packaged ones by name, duplicate keys refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

PACKAGE = "sublimate.configs"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one sentence that names the key or the file."""


def packaged_configs(kind: str | None = None) -> dict[str, Traversable]:
    """The packaged YAML files by `folder/stem`, sorted.

    Args:
        kind: only those in this sub-folder of `configs/`.
    """
    found = {name: file for name, file in _walk(resources.files(PACKAGE), "") if kind in (None, name.split("/")[0])}
    return dict(sorted(found.items()))


def find_config(source: str | Path, kind: str | None = None) -> tuple[str, str]:
    """The text and the label of a configuration: a file, or a packaged one by `stem` or `folder/stem`.

    Raises:
        ConfigError: when there is none, listing the packaged names, nearest first; or when a stem is in two folders.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if path.is_file():
            return path.read_text(encoding="utf-8"), str(source)
        raise ConfigError(f"There is no file {path}; {_listing(path.stem, kind)}")
    wanted = str(source)
    packaged = packaged_configs(kind)
    matches = [name for name in packaged if wanted in (name, name.rsplit("/", 1)[-1])]
    if len(matches) > 1:
        raise ConfigError(f"'{wanted}' is the name of several configurations: say {' or '.join(matches)}.")
    if not matches:
        raise ConfigError(f"There is no configuration '{wanted}'; {_listing(wanted, kind)}")
    return packaged[matches[0]].read_text(encoding="utf-8"), matches[0]


def parse_yaml(text: str, label: str) -> Any:
    """YAML to plain Python values; `1e-4` is a number, `no` a word, a key given twice an error.

    Raises:
        ConfigError: when the text is not valid YAML, naming the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{label}{line} is not valid YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{label} is not valid YAML: {' '.join(str(error).split())}.") from error


def to_yaml(values: object) -> str:
    """Plain Python values to YAML that `parse_yaml` reads back to equal ones, keys in their own order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=119)


class _Loader(yaml.SafeLoader):
    """Safe YAML without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key_node.tag != "tag:yaml.org,2002:merge" and key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key}' is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML whose strings survive `_Loader`."""


# YAML 1.1, which PyYAML implements, reads no, off, yes and on as booleans; `mixed_precision: no` is a word.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_BOOLEAN = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOLEAN, list("tTfF"))

# YAML 1.1, which PyYAML implements, reads 1e-4 (no dot) as a string.
_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml"), entry


def _listing(wanted: str, kind: str | None) -> str:
    names = [name.removeprefix(f"{kind}/") for name in packaged_configs(kind)]
    if not names:
        return "no configuration is packaged."

    def distance(name: str) -> float:
        return -difflib.SequenceMatcher(None, wanted, name.rsplit("/", 1)[-1]).ratio()

    return f"packaged ones are {', '.join(sorted(names, key=distance))}."
