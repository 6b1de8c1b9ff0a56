"""Checkpoints on disk: whether a folder or file is complete, safe and of a known family, before anything is loaded."""

from __future__ import annotations

import inspect
import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from sublimate.pipelines.placement import name_of

INDEX = "model_index.json"
"""What makes a folder a diffusers pipeline: its class, and the library and class of each component."""

PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})

# What diffusers and transformers call the files of a component's weights.
_WEIGHTS = ("diffusion_pytorch_model", "model")


def refuse_pickle(path: Path) -> None:
    """Pickles run code when they are opened.

    Raises:
        ValueError: for one, saying how to convert it.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ValueError(
            f"{path} is a pickle, which can run code when opened: convert it with torch.load(path, weights_only=True) "
            "and safetensors.torch.save_file, and open the .safetensors file."
        )


def read_scheduler(folder: Path) -> Any:
    """The stock scheduler in the `scheduler` folder of an export.

    Raises:
        ValueError: when there is none that diffusers knows.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    kind = getattr(diffusers, str(read_json(file).get("_class_name")), None)
    if kind is None:
        raise ValueError(f"{file} names no scheduler of diffusers {diffusers.__version__}: export the student again.")
    return kind.from_pretrained(file.parent)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: when the file is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): download or export the checkpoint again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object: download or export the checkpoint again.")
    return value


def check_folder(folder: Path, variant: str | None = None, given: Container[str] = ()) -> str:
    """Makes sure that a diffusers folder is complete, undamaged and free of pickles, reading headers only.

    Args:
        folder: with a `model_index.json`.
        variant: of the weights' files ("fp16"), None for the plain ones; components that lack it have plain ones.
        given: components that come from elsewhere, and may be missing.

    Returns:
        The pipeline's class name.

    Raises:
        ValueError: when something is missing, damaged or a pickle, naming it, or no component has the variant.
    """
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(f"{folder} has no model_index.json: it is not a diffusers pipeline, or only half written.")
    contents = read_json(index)
    if not isinstance(contents.get("_class_name"), str):
        raise ValueError(f"{index} names no pipeline class: download or export the checkpoint again.")
    for name, kind in contents.items():
        if not name.startswith("_") and isinstance(kind, list) and kind[1:] != [None] and name not in given:
            _check_component(folder / name, str(kind[1]), variant)
    if variant and not any(_has_variant(part, variant) for part in folder.iterdir() if part.is_dir()):
        raise ValueError(f"{folder} holds no weights of the variant {variant!r}: leave it out.")
    return contents["_class_name"]


def keep_options(pipeline: Any, options: Mapping[str, Any]) -> None:
    """Notes in a pipeline's configuration what its class is told and forgets, such as DiT's names of classes.

    What is not noted there is gone once the pipeline is saved.

    Args:
        pipeline: a diffusers pipeline.
        options: by name, as in `model_index.json`; those that its class does not take are left out.
    """
    accepted = inspect.signature(type(pipeline).__init__).parameters
    forgotten = {name: v for name, v in options.items() if name in accepted and name not in pipeline.config}
    pipeline.register_to_config(**forgotten)


def check_safetensors(path: Path) -> list[str]:
    """Makes sure that a safetensors file is whole, from its header and its size.

    Returns:
        The names of its tensors.

    Raises:
        ValueError: when it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): download or export the checkpoint again.") from error


def cast_file(file: Path, dtype: torch.dtype) -> None:
    """Rewrites a safetensors file's floating-point weights in another precision.

    Raises:
        ValueError: for numbers that are too large for it; the file is left as it was.
    """
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    # Copies: what `load_file` gives may be views of the file that is written.
    cast = {k: v.to(dtype, copy=True) if v.is_floating_point() else v.clone() for k, v in weights.items()}
    for name, value in cast.items():
        if value.is_floating_point() and not torch.equal(value.isfinite(), weights[name].isfinite()):
            raise ValueError(
                f"{name} of {file.parent.name} holds numbers too large for {name_of(dtype)}: save "
                "it in bfloat16 or float32."
            )
    save_file(cast, file, metadata)


def tidy_config(file: Path) -> None:
    """Takes out of a component's configuration where it was opened, which is nobody else's business.

    transformers opens a text encoder in the precision noted there, diffusers all else in float32: float32 it is.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return
    tidy = {name: value for name, value in content.items() if name != "_name_or_path"}
    if "quantization_config" not in tidy:
        tidy |= {name: "float32" for name in ("dtype", "torch_dtype") if tidy.get(name) in ("float16", "bfloat16")}
    if tidy != content:
        file.write_text(json.dumps(tidy, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_component(folder: Path, kind: str, variant: str | None) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing, so the checkpoint is only half written: get it again.")
    # Tokenizers, schedulers and image processors have no weights.
    if kind.endswith(("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor")):
        if not any(folder.glob("*.json")):
            raise ValueError(f"{folder} is empty, so the checkpoint is only half written: get it again.")
        if kind.endswith(("Tokenizer", "TokenizerFast")) and not _has_vocabulary(folder):
            raise ValueError(f"{folder} has no words, so the checkpoint is only half written: get it again.")
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder / 'config.json'} is missing, so the checkpoint is only half written: get it again.")
    read_json(folder / "config.json")
    files = weights_files(folder, variant)
    found = {path: set(check_safetensors(path)) for path in files if path.suffix != ".json"}
    if files[0].suffix == ".json":
        for name, shard in read_json(files[0]).get("weight_map", {}).items():
            if name not in found[folder / shard]:
                raise ValueError(f"{folder / shard} lacks {name}, which its index says it has: get it again.")
    for path, names in found.items():
        if any(".base_layer." in name for name in names):
            raise ValueError(
                f"{path} holds a LoRA beside its weights, which diffusers does not open: call "
                "pipeline.unload_lora_weights() before save_pretrained, after fuse_lora() if the LoRA is to stay."
            )


def _has_vocabulary(folder: Path) -> bool:
    """Whether a tokenizer's folder has the words, not only how it is made: transformers then makes one of no words."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")) or any(folder.glob("*.model")):
        return True
    return all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))


def weights_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files that the weights of a component consist of: one, or an index and the shards that it names.

    Args:
        folder: the component's.
        variant: of the files ("fp16"); the plain ones where there are none of it, as diffusers does.

    Raises:
        ValueError: when some are missing, or they are pickles.
    """
    suffix = f".{variant}" if variant and _has_variant(folder, variant) else ""
    for base in _WEIGHTS:
        if (whole := folder / f"{base}{suffix}.safetensors").is_file():
            return [whole]
    for base in _WEIGHTS:
        for index in (
            folder / f"{base}.safetensors.index{suffix}.json",
            folder / f"{base}{suffix}.safetensors.index.json",
        ):
            if index.is_file():
                return [index, *_shards(folder, read_json(index))]
    if any(path.suffix in PICKLE_SUFFIXES for path in folder.iterdir()):
        raise ValueError(
            f"{folder} holds its weights as a pickle only, which can run code when opened: convert them with "
            "pipeline.save_pretrained(folder, safe_serialization=True) in an environment you trust."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"it has {', '.join(others)}: pass their variant" if others else "get the checkpoint again"
    raise ValueError(f"The weights of {folder} are missing ({hint}).")


def _has_variant(folder: Path, variant: str) -> bool:
    return any(f".{variant}." in path.name for path in folder.iterdir())


def _shards(folder: Path, index: dict[str, Any]) -> list[Path]:
    shards = [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]
    if missing := [path for path in shards if not path.is_file()]:
        raise ValueError(f"{missing[0]} is missing, so the checkpoint is only half written: get it again.")
    return shards
