"""Checkpoints of one file, as they circulate beside diffusers' folders: whole ones, and ones without text encoders."""

from __future__ import annotations

import inspect
from collections.abc import Container
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler
from diffusers.loaders.single_file_utils import SingleFileComponentError, infer_diffusers_model_type
from safetensors import safe_open

from sublimate.pipelines.backbones.base import backbone_for
from sublimate.pipelines.checkpoints import INDEX, check_safetensors, read_json, read_scheduler, refuse_pickle
from sublimate.pipelines.locations import first_line
from sublimate.pipelines.progress import without_bars
from sublimate.pipelines.wholeness import check_loaded, unfilled

# What diffusers calls the families of single files, and their pipelines.
_FAMILIES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "inpainting_v2": "StableDiffusionInpaintPipeline",
    "upscale": "StableDiffusionUpscalePipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
}

# What names begin with in files that hold text encoders, and an autoencoder.
_TEXTS = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.")
_AUTOENCODER = ("first_stage_model.", "vae.")

# Names of empty tensors that say what a network predicts and how it was noised: velocity, up to pure noise.
_V_PREDICTION, _ZERO_SNR = "v_pred", "ztsnr"


def holds_texts(path: Path) -> bool:
    """Whether a file has the text encoders too, and not the network alone, or that and the autoencoder.

    Raises:
        ValueError: for a pickle, or a damaged file.
    """
    refuse_pickle(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a checkpoint: give a .safetensors file or a diffusers folder.")
    return any(name.startswith(_TEXTS) for name in check_safetensors(path))


@without_bars()
def open_whole(path: Path, dtype: torch.dtype, token: str | bool | None = None, config: Path | None = None) -> Any:
    """The pipeline of a file that has all weights.

    Args:
        path, dtype, token: as `open_model` takes them.
        config: a folder of its architecture; from the hub unless given.

    Raises:
        ValueError: for a file of no known family, one that lacks weights, or another architecture; and for one of
            Stable Diffusion 2 without config: those of 512 pixels predict noise and those of 768 velocity, with the
            same names and shapes, and few say which.
    """
    family, names = _family(path), check_safetensors(path)
    kind = _FAMILIES[family]
    if family == "v2" and config is None and _V_PREDICTION not in names:
        raise ValueError(
            f"{path} is of Stable Diffusion 2 and does not say whether it predicts noise (512 pixels) or velocity "
            "(768): give the diffusers folder or hub id of such a checkpoint as config."
        )
    try:
        pipeline = getattr(diffusers, kind).from_single_file(
            path, dtype=dtype, token=token, config=None if config is None else str(config)
        )
    except SingleFileComponentError as error:
        raise ValueError(
            f"{path} is not the whole checkpoint ({first_line(error)}): give one that is, or, where text encoders are "
            "what is missing, a diffusers folder that has them as config."
        ) from error
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        source = "which the hub gives, or a diffusers folder as config" if config is None else f"not that of {config}"
        raise ValueError(
            f"{path} cannot be opened as a {kind}: it needs all weights and its architecture's configuration, "
            f"{source} ({first_line(error)})"
        ) from error
    check_loaded(pipeline, path)
    pipeline.scheduler = _as_marked(pipeline.scheduler, names)
    return pipeline


@without_bars()
def open_parts(path: Path, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """The network of a file, its autoencoder if it has one, and the scheduler if it says what the network predicts.

    They have the names of the components that they replace.

    Args:
        path, dtype: as `open_model` takes them.
        folder: a diffusers folder of the architecture.

    Raises:
        ValueError: for a file of another architecture, or one that diffusers reads no single files of.
    """
    index = read_json(folder / INDEX)
    held = check_safetensors(path)
    names = [backbone_for(str(index.get("_class_name"))).network_attribute]
    names += ["vae"] * any(name.startswith(_AUTOENCODER) for name in held)
    found: dict[str, Any] = {"scheduler": _as_marked(read_scheduler(folder), held)} if _V_PREDICTION in held else {}
    for name in names:
        cls = getattr(diffusers, index[name][1])
        if not hasattr(cls, "from_single_file"):
            raise ValueError(f"{path} cannot be opened: diffusers reads no single files of a {cls.__name__}.")
        try:
            found[name] = cls.from_single_file(str(path), config=str(folder), subfolder=name, dtype=dtype)
        except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"{path} has no {name} of the kind that {folder} has: give a folder of its architecture as config "
                f"({first_line(error)})"
            ) from error
        if lacking := unfilled(found[name]):
            raise ValueError(f"The {name} of {path} lacks {lacking[0]}: get the checkpoint again.")
    return found


def single_file_family(path: Path) -> str:
    """The pipeline class of a single-file checkpoint, from the names and shapes in its header.

    Raises:
        ValueError: when the file is damaged or of no known family.
    """
    return _FAMILIES[_family(path)]


def _family(path: Path) -> str:
    """Its family, as diffusers calls it: one of `_FAMILIES`."""
    names = check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        header = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    try:
        family = infer_diffusers_model_type(header)
    except (KeyError, IndexError, NameError):
        # diffusers relies on tensors that go with the ones it recognises a family by.
        family = None
    # Files that match nothing are reported as "v1" by diffusers, and text encoders alone as what they belong to.
    if family not in _FAMILIES or (family in ("v1", "xl_base") and not any(map(_is_unet, names))):
        raise ValueError(
            f"{path} is not a whole Stable Diffusion 1, 2, 3 or XL checkpoint: give one, or a diffusers folder; of a "
            "network alone, one with all other parts as config (LoRA files and edits are applied to an open model)."
        )
    return family


def _as_marked(scheduler: Any, names: Container[str]) -> Any:
    """The scheduler, with what a file's marks say; DDIM's on the same table where its class knows no zero SNR."""
    if _V_PREDICTION not in names:
        return scheduler
    zero_snr = {"rescale_betas_zero_snr": True} if _ZERO_SNR in names else {}
    known = zero_snr.keys() <= inspect.signature(type(scheduler).__init__).parameters.keys()
    return (type(scheduler) if known else DDIMScheduler).from_config(
        scheduler.config, prediction_type="v_prediction", **zero_snr
    )


def _is_unet(name: str) -> bool:
    return name.startswith("model.diffusion_model.")
