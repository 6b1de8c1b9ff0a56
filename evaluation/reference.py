"""How close a model's images come to pictures with captions: distances of features, and how well images fit captions.

Images are drawn, encoded and forgotten part by part, and processes exchange features alone, so that no number of them
is too large for memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sublimate.evaluation.encoders import Encoder, ImageTextEncoder
from sublimate.evaluation.fidelity import Fidelity, extract, fidelity, real_versus_real
from sublimate.evaluation.intervals import Mean
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model
from sublimate.training.ahead import ahead
from sublimate.training.captioned import Images
from sublimate.training.together import accelerator, drawn_together

PART = 64
"""Images that are held at once, unless more are drawn at once."""


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
    batch_size: int | None = None,
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
        batch_size: images that are drawn, and encoded, at once; as many as suit their size unless given.
        progress: show the main process's bars.
        options: of `generate`; sampled as the checkpoint asks unless given.

    Returns:
        The measurements.

    Raises:
        ValueError: before anything is drawn: for more images than pictures, for fewer than the features' covariance
            needs, for pictures that cannot be read or occur twice, or for an encoder that does not see the images or
            sees them differently each time.
    """
    n = len(pictures) if n is None else n
    if n > len(pictures):
        raise ValueError(f"{n} images are compared with as many pictures: ask for at most {len(pictures)}.")
    with torch.no_grad():
        blank = model.render(torch.zeros(1, *model.latent_shape, device=model.device, dtype=model.dtype))
    seen = extract(encoder.features, blank)
    if not torch.allclose(seen, extract(encoder.features, blank), rtol=1e-3, atol=1e-5):
        raise ValueError("The encoder's features of one image differ from call to call: choose another encoder.")
    if n <= (size := seen.shape[1]):
        raise ValueError(
            f"{n} images cannot fit a covariance of the encoder's {size} features: give more than {size} pictures, or "
            "an encoder with fewer features."
        )
    count = 2 * n if len(pictures) >= 2 * n else n
    rows = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    captions = [pictures.captions[row] for row in rows] if pictures.captions else []

    def draw(places: range) -> Tensor:
        asked = captions[places.start : places.stop] if captions else len(places)
        return generate(model, asked, seed=seed, first=places.start, batch_size=batch_size, device="cpu", **options)

    def read(places: range) -> Tensor:
        return torch.stack([*ahead(pictures.image, [rows[place] for place in places])])

    size = max(PART, batch_size or 0)
    # What is cheap comes first: pictures may be damaged.
    shown = _encoded(encoder, read, captions, count, size, "reading" if progress else None)
    if copies := count - len(shown.digests.unique()):
        raise ValueError(
            f"{copies} of {count} pictures occur before, and would be their own nearest ones: give each one caption."
        )
    drawn = _encoded(encoder, draw, captions[:n], n, size, "drawing" if progress else None)
    # The distances of all pairs want a GPU, and float64, which only some have.
    device = model.device if model.device.type == "cuda" else "cpu"
    generated, reference = drawn.features.to(device), shown.features.to(device)
    return Closeness(
        fidelity=fidelity(generated, reference[:n]),
        floor=real_versus_real(reference, n, seed=seed) if count == 2 * n else None,
        similarity=None if drawn.fits is None else Mean.of(drawn.fits.tolist()),
        picture_similarity=None if shown.fits is None else Mean.of(shown.fits[:n].tolist()),
    )


@dataclass(frozen=True)
class _Encoded:
    """Of images by their places: features (N, D), how well each fits its caption, (N,), and what tells it apart."""

    features: Tensor
    fits: Tensor | None
    digests: Tensor


def _encoded(
    encoder: Encoder, images: Callable[[range], Tensor], captions: list[str], count: int, size: int, what: str | None
) -> _Encoded:
    """What is kept of `count` images, `size` of which are there at once."""
    reader = encoder if captions and isinstance(encoder, ImageTextEncoder) else None
    shown = what is not None and accelerator().is_main_process

    def share(places: slice) -> Tensor:
        found = []
        with tqdm(total=places.stop - places.start, desc=what, disable=not shown) as bar:
            for start in range(places.start, places.stop, size):
                part = range(start, min(start + size, places.stop))
                there = images(part)
                features = extract(encoder.features, there, batch_size=PART)
                columns = [features, torch.tensor([_digest(image) for image in there], dtype=torch.float64)[:, None]]
                if reader is not None:
                    columns.append(reader.similarity(features, captions[part.start : part.stop])[:, None])
                found.append(torch.cat(columns, dim=1))
                bar.update(len(part))
        return torch.cat(found)

    columns = drawn_together(count, share)
    last = -1 if reader is None else -2
    return _Encoded(columns[:, :last], None if reader is None else columns[:, -1], columns[:, last])


def _digest(image: Tensor) -> int:
    """A number that another image hardly has, exact in float64."""
    return int.from_bytes(hashlib.sha256(image.contiguous().numpy().tobytes()).digest()[:6])
