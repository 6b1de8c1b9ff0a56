"""The sampling loop: batches of prompts, each image's own noise, guidance, and whatever walks from noise to images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sublimate.diffusion import samplers
from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.predictions import Prediction
from sublimate.pipelines.few_steps import DenoiseTowards
from sublimate.pipelines.model import Model


@dataclass(frozen=True)
class Part:
    """Some of the images, which are drawn at once.

    Attributes:
        rows: which of them.
        condition: what the network is told, one per image.
        denoise: the network, told and guided; it is also told the time a jump ends at.
        z: the initial noise, N(0, I) times the model's noise scale.
        noise: fresh noise, each image's own.
    """

    rows: slice
    condition: Condition
    denoise: DenoiseTowards
    z: Tensor
    noise: samplers.Noise

    def plain(self, x_t: Tensor, t: Tensor) -> Prediction:
        """For samplers that jump nowhere: no network is told the time towards which it denoises."""
        return self.denoise(x_t, t, t)


Run = Callable[[Part], Tensor]
"""What becomes of a part, (images, ...)."""


@torch.no_grad()
def sample(
    model: Model,
    condition: Callable[[slice], Condition],
    run: Run,
    count: int,
    *,
    null: Condition | None = None,
    scale: float = 1.0,
    reads_target: bool = False,
    seed: int = 0,
    first: int = 0,
    z: Tensor | None = None,
    shape: Sequence[int] | None = None,
    batch_size: int | None = None,
    calls: int = 0,
    progress: bool = False,
) -> Tensor:
    """Draws by parts; their size changes nothing but rounding.

    Args:
        model: what draws.
        condition: what the network is told for some of the images.
        run: walks a part from noise to what is wanted, without gradients unless it asks for them.
        count: images.
        null: what guidance leads away from; needed unless the scale is 1 or is told.
        scale: of guidance, 1 is none.
        reads_target: the network is told the time a jump ends at, and guided.
        seed: keys the noise, together with each image's place.
        first: the place of the first image.
        z: (count, *shape), replaces the initial noise of the seed; fresh noise stays the seed's.
        shape: of one latent; the model's own unless given.
        batch_size: images at once; as many as `at_once` says unless given.
        calls: of the network per image, for the bar.
        progress: show a bar.

    Returns:
        (count, ...), what `run` made of the parts.
    """
    shape, null = model.latent_shape if shape is None else shape, Condition() if null is None else null
    batch_size = at_once(shape) if batch_size is None else batch_size
    found = []
    with tqdm(total=count * calls, unit="pass", disable=not progress) as bar:
        for start in range(0, count, batch_size):
            rows = slice(start, min(start + batch_size, count))
            told = condition(rows)
            denoise = _counted(telling(model.denoiser, told, null, scale, reads_target=reads_target), bar)
            generators = [image_generator(seed, first + i) for i in range(rows.start, rows.stop)]
            # Drawn even where it is replaced: what comes next is a sampler's fresh noise.
            own = _draw(shape, generators)
            noise = (model.noise_scale * (own if z is None else z[rows])).to(model.device, model.dtype)
            found.append(run(Part(rows, told, denoise, noise, _fresh(shape, generators))))
    return torch.cat(found)


def at_once(shape: Sequence[int], most: int = 64, cost: int = 1) -> int:
    """How many samples go through a network together where nobody says: about as many values as 64 of 32x32 latents.

    That is 16 of Stable Diffusion 1.5's latents and 4 of XL's.

    Args:
        shape: of one latent.
        most: of small ones.
        cost: how much more a sample takes than a pass without gradients: decoding 4 times as much.
    """
    return max(1, min(most, 64 * 32 * 32 // (shape[-2] * shape[-1] * cost)))


def image_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of one image, keyed by (seed, index).

    A stock pipeline given `generator=[image_generator(seed, i) for i in range(n)]` starts from the same noise.
    """
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def initial_noise(shape: Sequence[int], seed: int, indices: Sequence[int]) -> Tensor:
    """N(0, I) for some images, (len(indices), *shape) float32 on the CPU; each row depends on its own key only."""
    return _draw(shape, [image_generator(seed, i) for i in indices])


def telling(
    denoiser: Denoiser,
    condition: Condition,
    null: Condition,
    scale: float,
    *,
    reads_target: bool = False,
) -> DenoiseTowards:
    """A denoiser with condition and guidance chosen.

    Args:
        denoiser: the network.
        condition: of batch size 1 or batch.
        null: what guidance leads away from; not used for scale 1 or where the scale is told.
        scale: 1 is none.
        reads_target: the network is told the time a jump ends at, and guided.
    """

    def denoise(x_t: Tensor, t: Tensor, s: Tensor) -> Prediction:
        told = condition.expand(len(x_t)).replace(target_time=s) if reads_target else condition
        return guided(denoiser, x_t, t, told, null, scale)

    return denoise


def _counted(denoise: DenoiseTowards, bar: tqdm) -> DenoiseTowards:
    def counted(x_t: Tensor, t: Tensor, s: Tensor) -> Prediction:
        bar.update(len(x_t))
        return denoise(x_t, t, s)

    return counted


def _fresh(shape: Sequence[int], generators: Sequence[torch.Generator]) -> samplers.Noise:
    return lambda x: _draw(shape, generators).to(x)


def _draw(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """The next N(0, I) of each image, (len(generators), *shape)."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
