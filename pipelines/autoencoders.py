"""Between media and latents, differentiable both ways."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Copies in float32, with the state of the autoencoder that they are copies of.
_TWINS: WeakKeyDictionary[nn.Module, tuple[Any, nn.Module]] = WeakKeyDictionary()


def encode_images(vae: Any, images: Tensor) -> Tensor:
    """Latents as the denoiser sees them: the posterior's mode, shifted and scaled.

    Args:
        vae: a diffusers autoencoder of images in [-1, 1].
        images: (batch, 3, height, width) in [0, 1].

    Returns:
        (batch, channels, height / factor, width / factor), differentiable in the images.
    """
    return encode_media(vae, 2 * images.to(vae.dtype) - 1)


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Images of latents, not clamped.

    Args:
        vae: a diffusers autoencoder of images in [-1, 1].
        latents: (batch, channels, height, width) as the denoiser sees them.

    Returns:
        (batch, 3, height * factor, width * factor), about [0, 1], differentiable in the latents.
    """
    return decode_media(vae, latents) / 2 + 0.5


def encode_media(vae: Any, media: Tensor) -> Tensor:
    """Latents of media in the autoencoder's own units.

    Args:
        vae: a diffusers autoencoder, variational (`AutoencoderKL`) or not (`AutoencoderDC`).
        media: (batch, channels, height, width) as the autoencoder was trained on them.

    Returns:
        The posterior's mode, shifted and scaled; differentiable in the media.
    """
    encoded = vae.encode(media.to(vae.dtype))
    mode = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latent
    shift, factor = _affine(vae)
    return (mode - shift) * factor


def decode_media(vae: Any, latents: Tensor) -> Tensor:
    """Media, in the autoencoder's own units, of latents as the denoiser sees them; differentiable in the latents."""
    shift, factor = _affine(vae)
    return vae.decode(latents.to(vae.dtype) / factor + shift).sample


def exact(vae: Any) -> Any:
    """The autoencoder, in float32 where it overflows in float16 (`force_upcast`), as some stock pipelines have it.

    The copy in float32 is kept as long as the autoencoder, its weights and its options are what they were.
    """
    if vae.dtype != torch.float16 or not vae.config.force_upcast:
        _TWINS.pop(vae, None)
        return vae
    weights = tuple((id(t), t.data_ptr(), t._version) for t in (*vae.parameters(), *vae.buffers()))
    # Tiles and slices.
    options = {name: value for name, value in vars(vae).items() if isinstance(value, bool | int | float)}
    state, (known, twin) = (weights, options), _TWINS.pop(vae, (None, None))
    if twin is None or known != state:
        twin = copy.deepcopy(vae).float()
    _TWINS[vae] = state, twin
    return twin


def _affine(vae: Any) -> tuple[Tensor | float, Tensor | float]:
    """(shift, factor): the denoiser's latents are (the autoencoder's - shift) * factor, by channel if it says so."""
    config = vae.config
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return config.get("shift_factor") or 0.0, config.scaling_factor
    shift, deviation = (torch.tensor(v, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1) for v in (mean, std))
    return shift, config.scaling_factor / deviation
