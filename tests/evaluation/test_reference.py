"""Distance to pictures: the numbers are those of all features at once, and nothing is drawn in vain."""

import pytest
import torch
import vision
from captioned_sets import caption
from PIL import Image

from sublimate.evaluation import reference
from sublimate.evaluation.encoders import open_encoder
from sublimate.evaluation.fidelity import extract, fidelity, real_versus_real
from sublimate.evaluation.reference import measure_closeness
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.training.captioned import Framing, Images

N, DRAWN = 12, {"steps": 1, "seed": 4, "guidance_scale": 1.0}


class Noise:
    """Pictures of noise, each with its caption."""

    def __init__(self, count, captions=True):
        self.pixels = torch.randint(256, (count, 16, 16, 3), generator=torch.Generator().manual_seed(0))
        self.captions = [caption(i) for i in range(count)] if captions else []

    def __len__(self):
        return len(self.pixels)

    def picture(self, row):
        return Image.fromarray(self.pixels[row].to(torch.uint8).numpy())


def images(count, **options):
    return Images(Noise(count, **options), Framing(16, 16, center_crop=True))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return open_encoder(str(vision.clip(tmp_path_factory.mktemp("clip"))))


@pytest.mark.parametrize("count", [N, 2 * N])
def test_the_numbers_are_those_of_all_images_at_once(tiny_sd, encoder, monkeypatch, count):
    monkeypatch.setattr(reference, "PART", 5)
    model, pictures = open_model(tiny_sd), images(count)
    found = measure_closeness(model, pictures, encoder, n=N, **DRAWN)
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(4))
    captions = [caption(row) for row in rows.tolist()]
    drawn = extract(encoder.features, generate(model, captions[:N], **DRAWN))
    shown = extract(encoder.features, pictures[rows])
    expected = fidelity(drawn, shown[:N])
    assert found.fidelity.fid == pytest.approx(expected.fid, rel=1e-3)
    assert found.fidelity.kid == pytest.approx(expected.kid, rel=1e-3)
    for mean, features in ((found.similarity, drawn), (found.picture_similarity, shown[:N])):
        fits = encoder.similarity(features, captions[:N])
        assert mean.value == pytest.approx(fits.mean().item(), abs=1e-5) and mean.n == N
        assert mean.error == pytest.approx(fits.std().item() / N**0.5, rel=1e-3)
    assert found.floor == (real_versus_real(shown, N, seed=4) if count == 2 * N else None)


def test_without_captions_nothing_is_compared_with_them(tiny_unconditional, encoder):
    found = measure_closeness(open_model(tiny_unconditional), images(N, captions=False), encoder, **DRAWN)
    assert found.similarity is None and found.picture_similarity is None and found.fidelity.n == N


def test_what_cannot_be_compared_is_not_drawn(tiny_sd, encoder, monkeypatch):
    monkeypatch.setattr(reference, "generate", lambda *_, **__: pytest.fail("drawn"))
    model = open_model(tiny_sd)
    with pytest.raises(ValueError, match="13 images are compared with as many pictures: ask for at most 12"):
        measure_closeness(model, images(N), encoder, n=13)
    with pytest.raises(ValueError, match="8 images cannot fit a covariance of the encoder's 8 features: give more"):
        measure_closeness(model, images(N), encoder, n=8)


def test_pictures_are_read_before_anything_is_drawn(tiny_sd, encoder, monkeypatch):
    monkeypatch.setattr(reference, "generate", lambda *_, **__: pytest.fail("drawn"))
    model, damaged, twice = open_model(tiny_sd), images(N), images(N)
    damaged.rows.pixels = damaged.rows.pixels[:-1].tolist()
    with pytest.raises(AttributeError):
        measure_closeness(model, damaged, encoder)
    twice.rows.pixels[5] = twice.rows.pixels[2]
    with pytest.raises(ValueError, match="1 of 12 pictures occur before"):
        measure_closeness(model, twice, encoder)


def test_features_that_differ_from_call_to_call_are_refused(tiny_sd):
    class Random(torch.nn.Module):
        def features(self, images):
            return torch.rand(len(images), 4)

    with pytest.raises(ValueError, match="differ from call to call: choose another"):
        measure_closeness(open_model(tiny_sd), images(N), Random())


def test_images_are_drawn_as_many_at_once_as_asked(tiny_sd, encoder, monkeypatch):
    monkeypatch.setattr(reference, "PART", 2)
    drawn = []
    monkeypatch.setattr(
        reference,
        "generate",
        lambda model, prompts, **options: drawn.append(len(prompts)) or generate(model, prompts, **options),
    )
    measure_closeness(open_model(tiny_sd), images(N), encoder, batch_size=5, **DRAWN)
    assert drawn == [5, 5, 2]
