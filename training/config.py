"""Run configurations: YAML and `key.sub=value` overrides become frozen pydantic models, or one clear sentence."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from sublimate.pipelines.cards import public_values
from sublimate.training.config_files import ConfigError, find_config, parse_yaml, to_yaml

__all__ = [
    "Config",
    "ConfigError",
    "describe_error",
    "dump_config",
    "load_config",
    "parse_overrides",
    "validate_section",
]

Key = tuple[str | int, ...]


class Config(BaseModel):
    """Base of every configuration: frozen, and a key that it does not have is an error.

    A section that a file or an override gives in part keeps, for what it leaves out, the value that the section has
    as a default *of this field* (not of the section's class).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="constants")

    @model_validator(mode="before")
    @classmethod
    def _complete_sections(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        completed = dict(data)
        for name, field in cls.model_fields.items():
            if isinstance(data.get(name), Mapping) and isinstance(field.annotation, type):
                default = field.get_default(call_default_factory=True, validated_data={})
                if isinstance(default, Config) and field.annotation is type(default):
                    completed[name] = _merge(default, data[name])
        return completed


ConfigType = TypeVar("ConfigType", bound=Config)


def load_config(
    model_cls: type[ConfigType], source: str | Path, overrides: Sequence[str] = (), *, kind: str | None = None
) -> ConfigType:
    """Reads a run's configuration.

    Args:
        model_cls: the configuration's class.
        source: a YAML file, or the name of a packaged configuration (`ink_f_distill`, or `distill/ink_f_distill`).
        overrides: `key.sub=value`, applied in order after the file; the value is YAML.
        kind: look for packaged names in this sub-folder of `configs/` only.

    Raises:
        ConfigError: when there is no such configuration, the file is not valid YAML, a key is unknown, or a value
            does not fit; the message names the full dotted key.
    """
    text, label = find_config(source, kind)
    values = parse_yaml(text, label)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{label} must hold keys and values, not {_shown(values)}.")
    values = parse_overrides(overrides, values)
    return _validate(model_cls, values, "", label)


def validate_section(
    model_cls: type[ConfigType], mapping: Mapping[str, object], prefix: str = "objective"
) -> ConfigType:
    """Validates a section whose class only its owner knows, such as a method's own options.

    Args:
        model_cls: the section's class.
        mapping: its keys and values.
        prefix: where the section stands, for messages.

    Raises:
        ConfigError: as `load_config`, with `prefix` before the key.
    """
    return _validate(model_cls, mapping, prefix, None)


def parse_overrides(overrides: Sequence[str], values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`key.sub=value` assignments as nested values, on top of `values`.

    Raises:
        ConfigError: when one has another form or does not fit.
    """
    changed = copy.deepcopy(dict(values or {}))
    for override in overrides:
        _apply_override(changed, override)
    return changed


def dump_config(config: Config, *, public: bool = False) -> str:
    """The configuration as YAML, defaults included; `load_config` reads it back to an equal one.

    Args:
        config: what to write.
        public: for a card: of paths that lead out of the working folder only the last part is written.
    """
    values = config.model_dump(mode="json")
    return to_yaml(public_values(values) if public else values)


def describe_error(
    error: ValidationError,
    data: object = None,
    *,
    model_cls: type[BaseModel] | None = None,
    prefix: str = "",
    label: str | None = None,
) -> str:
    """One sentence for what pydantic found: the first unknown key, else the first value that does not fit.

    Args:
        error: what pydantic raised.
        data: what was validated; tells keys from the tags that pydantic adds for unions.
        model_cls: the validated class, for the nearest valid key.
        prefix: the dotted key of the validated section.
        label: the file's name, or None.
    """
    problems: dict[Key, list[Any]] = {}
    for problem in error.errors(include_url=False):
        key = problem["loc"] if data is None else _key_in(data, problem["loc"], problem["type"] == "missing")
        problems.setdefault(key, []).append(problem)
    key, found = min(problems.items(), key=lambda item: item[1][0]["type"] != "extra_forbidden")
    where = f" in {label}" if label else ""
    name = _dotted(prefix, key)
    first = found[0]
    if first["type"] == "extra_forbidden":
        sentence = f"Unknown key '{name}'{where}; {_hint(model_cls, prefix, key)}"
    elif first["type"] == "missing":
        sentence = f"'{name}' is missing{where}: set it in the file or as {name}=value."
    elif first["type"] == "value_error":
        sentence = f"{name}: {first['ctx']['error']}" if name else str(first["ctx"]["error"])
    elif all(problem["msg"].startswith("Input should be ") for problem in found):
        expected = " or ".join(dict.fromkeys(_expected(problem["msg"]) for problem in found))
        sentence = f"'{name}'{where} must be {expected}, not {_shown(first['input'])}."
    else:
        sentence = f"'{name}'{where} is {_shown(first['input'])}: {first['msg']}."
    others = len(problems) - 1
    return sentence + (f" ({others} more problem{'s' * (others > 1)} after this one.)" if others else "")


def _validate(model_cls: type[ConfigType], values: Mapping[str, object], prefix: str, label: str | None) -> ConfigType:
    try:
        return model_cls.model_validate(values)
    except ValidationError as error:
        sentence = describe_error(error, values, model_cls=model_cls, prefix=prefix, label=label)
        raise ConfigError(sentence) from error


def _merge(default: Config, given: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {name: getattr(default, name) for name in default.model_fields_set}
    for name, value in given.items():
        current = merged.get(name)
        if isinstance(current, Config) and isinstance(value, Mapping):
            value = _merge(current, value)
        merged[name] = value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one `key.sub=value`; whether the key exists is for the validation to say."""
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"The override {override!r} must have the form key.sub=value.")
    section = values
    for depth, part in enumerate(parts[:-1], start=1):
        inner = section.setdefault(part, {})
        if not isinstance(inner, dict):
            owner = ".".join(parts[:depth])
            raise ConfigError(f"The override {override!r} does not fit: '{owner}' is {_shown(inner)}, not a section.")
        section = inner
    section[parts[-1]] = parse_yaml(text, f"the override {override!r}")


def _key_in(data: object, location: Iterable[str | int], missing: bool) -> Key:
    """The part of pydantic's location that exists in the data: unions add tags that no user wrote."""
    parts, key = tuple(location), []
    for position, part in enumerate(parts):
        if isinstance(data, BaseModel):
            data = {name: getattr(data, name) for name in type(data).model_fields}
        try:
            data = data[part]  # type: ignore[index]
        except (TypeError, LookupError):
            if not (missing and position == len(parts) - 1):
                continue
        key.append(part)
    return tuple(key)


def _hint(model_cls: type[BaseModel] | None, prefix: str, key: Key) -> str:
    """The nearest valid key: beside the unknown one, or the same word in another section; else all that fit there."""
    if model_cls is None:
        return "remove it."
    owners = [model_cls]
    for part in key[:-1]:
        if isinstance(part, str):
            fields = (owner.model_fields.get(part) for owner in owners)
            owners = [section for field in fields if field for section in _sections(field.annotation)]
    siblings = sorted({name for owner in owners for name in owner.model_fields})
    unknown = str(key[-1])
    if near := difflib.get_close_matches(unknown, siblings, n=1):
        return f"did you mean '{_dotted(prefix, (*key[:-1], near[0]))}'?"
    leaves = {dotted.rsplit(".", 1)[-1]: dotted for dotted in reversed(_all_keys(model_cls))}
    if near := difflib.get_close_matches(unknown, leaves, n=1):
        return f"did you mean '{_dotted(prefix, (leaves[near[0]],))}'?"
    return f"valid keys there are {', '.join(siblings)}." if siblings else "nothing can be set there."


def _all_keys(model_cls: type[BaseModel]) -> list[str]:
    keys = []
    for name, field in model_cls.model_fields.items():
        keys.append(name)
        keys += [f"{name}.{key}" for section in _sections(field.annotation) for key in _all_keys(section)]
    return keys


def _sections(annotation: object) -> list[type[BaseModel]]:
    """The configuration classes that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]


def _dotted(prefix: str, key: Iterable[str | int]) -> str:
    return ".".join([prefix, *map(str, key)] if prefix else map(str, key))


def _expected(message: str) -> str:
    """What pydantic says the input should be, without how its own parsing went and in YAML's words."""
    expected = message.removeprefix("Input should be ")
    for detail in (", unable to", ", got a", " or instance of"):
        expected = expected.split(detail)[0]
    words = {"a valid dictionary": "a section of keys and values", "a valid tuple": "a list", "None": "null"}
    return words.get(expected, expected)


def _shown(value: object) -> str:
    """A value as YAML writes it, on one line and not too long."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("\n...\n").strip()
    except yaml.YAMLError:
        text = repr(value)
    if isinstance(value, str) and not text.startswith(("'", '"')):
        text = f"'{text}'"
    return text if len(text) <= 60 else text[:57] + "..."
