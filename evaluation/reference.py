"""How close a model's images come to pictures with captions: distances of features, and how well images fit captions.

Images are drawn, encoded and forgotten part by part, and processes exchange features alone, so that no number of them
is too large for memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sublimate.evaluation.encoders import Encoder, ImageTextEncoder
from sublimate.evaluation.fidelity import Fidelity, extract, fidelity, real_versus_real
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model
from sublimate.training.ahead import ahead
from sublimate.training.captioned import Images
from sublimate.training.together import accelerator, drawn_together

PART = 64
"""Images that are held at once."""


@dataclass(frozen=True)
class Mean:
    """An average, and how far it would move from draw to draw.

    Attributes:
        value: the average of n values.
        error: its standard error.
        n: how many were averaged.
    """

    value: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        """The average of values (n,), n at least 2."""
        return cls(values.mean().item(), values.std().item() / math.sqrt(len(values)), len(values))

    def __str__(self) -> str:
        return f"{self.value:.4f} +- {self.error:.4f} (n={self.n})"


@dataclass(frozen=True)
class Closeness:
    """What was measured of one model with one seed.

    Attributes:
        fidelity: distances to the pictures.
        floor: the same between two halves of them at the same n; None where there are too few.
        similarity: cosine of each image with its caption; None for encoders without texts.
        picture_similarity: the same for the pictures themselves.
    """

    fidelity: Fidelity
    floor: Fidelity | None
    similarity: Mean | None
    picture_similarity: Mean | None

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return asdict(self)


def measure_closeness(
    model: Model,
    pictures: Images,
    encoder: Encoder,
    *,
    n: int | None = None,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Closeness:
    """Draws the captions of pictures, on all processes of a launch together, and compares.

    Args:
        model: what draws; an unconditional one draws as many images without captions.
        pictures: of the model's own size.
        encoder: says what is alike, and of images and texts also which fit.
        n: images, for as many pictures, which are chosen at random; all unless given. With at least twice as many
            pictures, the floor is measured too.
        seed: of the images and of the choice.
        progress: show the main process's bars.
        options: of `generate`; sampled as the checkpoint asks unless given.

    Returns:
        The measurements.

    Raises:
        ValueError: before anything is drawn: for more images than pictures, for fewer than the features' covariance
            needs, or for images that the encoder does not see.
    """
    n = len(pictures) if n is None else n
    if n > len(pictures):
        raise ValueError(f"{n} images are compared with as many pictures: ask for at most {len(pictures)}.")
    with torch.no_grad():
        blank = model.render(torch.zeros(1, *model.latent_shape, device=model.device, dtype=model.dtype))
    if n <= (size := extract(encoder.features, blank).shape[1]):
        raise ValueError(
            f"{n} images cannot fit a covariance of the encoder's {size} features: give more than {size} pictures, or "
            "an encoder with fewer features."
        )
    count = 2 * n if len(pictures) >= 2 * n else n
    rows = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    captions = [pictures.captions[row] for row in rows] if pictures.captions else []

    def draw(places: range) -> Tensor:
        asked = captions[places.start : places.stop] if captions else len(places)
        return generate(model, asked, seed=seed, first=places.start, **options)

    def read(places: range) -> Tensor:
        return torch.stack([*ahead(pictures.image, [rows[place] for place in places])])

    generated, fits = _encoded(encoder, draw, captions[:n], n, "drawing" if progress else None)
    reference, fit = _encoded(encoder, read, captions, count, "reading" if progress else None)
    return Closeness(
        fidelity=fidelity(generated, reference[:n]),
        floor=real_versus_real(reference, n, seed=seed) if count == 2 * n else None,
        similarity=None if fits is None else Mean.of(fits),
        picture_similarity=None if fit is None else Mean.of(fit[:n]),
    )


def _encoded(
    encoder: Encoder, images: Callable[[range], Tensor], captions: list[str], count: int, what: str | None
) -> tuple[Tensor, Tensor | None]:
    """Features (count, D) of images by their places, and how well each fits its caption, (count,) or None."""
    reader = encoder if captions and isinstance(encoder, ImageTextEncoder) else None
    shown = what is not None and accelerator().is_main_process

    def share(places: slice) -> Tensor:
        found = []
        with tqdm(total=places.stop - places.start, desc=what, disable=not shown) as bar:
            for start in range(places.start, places.stop, PART):
                part = range(start, min(start + PART, places.stop))
                features = extract(encoder.features, images(part))
                if reader is not None:
                    fits = reader.similarity(features, captions[part.start : part.stop])
                    features = torch.cat([features, fits[:, None]], dim=1)
                found.append(features)
                bar.update(len(part))
        return torch.cat(found)

    columns = drawn_together(count, share)
    return (columns, None) if reader is None else (columns[:, :-1], columns[:, -1])
