"""Controls: zero where they are obeyed, with the right gradient everywhere, and one sample at a time."""

from types import SimpleNamespace

import pytest
import torch

from sublimate.pipelines import controls

REFERENCE = torch.rand(3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LEFT = torch.cat([torch.ones(8, 4), torch.zeros(8, 4)], dim=1)


class Brightness:
    """A detector of two labels and a reject class that reads the mean of an image."""

    groups = {"light": ("dark", "bright")}  # noqa: RUF012

    def __call__(self, images):
        mean = images.flatten(1).mean(1)
        return {"light": torch.stack([1 - mean, 0.9 * mean, 0.1 * mean], dim=1)}


CONTROLS = {
    "keep": controls.keep(REFERENCE, LEFT),
    "colour": controls.colour((0.9, 0.1, 0.2), LEFT),
    "structure": controls.structure(REFERENCE, cells=4),
    "brightness_map": controls.brightness_map(torch.eye(2)),
    "shows": controls.shows(Brightness(), light="bright"),
    "intensity": controls.intensity(torch.linspace(0, 1, 4)),
    "together": controls.together({controls.colour((0.5, 0.5, 0.5)): 2.0, controls.keep(REFERENCE, LEFT): 0.5}),
}
EVERY = pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)
# Which of eight bins sounds like which pitch class: two like C, one like G.
BINS = torch.zeros(12, 8)
BINS[0, 1] = BINS[0, 5] = BINS[7, 2] = BINS[9, 7] = 1
MELODY = controls.melody([0, None, 7], BINS)


def media(count=2, seed=1):
    return torch.rand(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
@EVERY
def test_gradients_are_those_of_finite_differences(control):
    assert torch.autograd.gradcheck(lambda x: control(x), media().requires_grad_(True))


@EVERY
def test_samples_do_not_interact(control):
    x = media(3)
    whole = control(x)
    assert whole.shape == (3,) and bool((whole > 0).all())
    torch.testing.assert_close(whole, torch.cat([control(part) for part in x.split(1)]))


def test_each_is_zero_where_it_is_obeyed():
    x = media(1)
    x[..., :4] = REFERENCE[..., :4]
    assert float(CONTROLS["keep"](x)) == 0
    painted = torch.tensor([0.9, 0.1, 0.2]).double()[:, None, None] * LEFT
    assert float(CONTROLS["colour"](painted[None])) == pytest.approx(0, abs=1e-15)
    assert float(CONTROLS["structure"](REFERENCE[None])) == pytest.approx(0, abs=1e-15)
    assert (
        float(
            CONTROLS["brightness_map"](torch.eye(2).repeat_interleave(4, 0).repeat_interleave(4, 1).expand(1, 3, 8, 8))
        )
        == 0
    )
    rising = torch.linspace(0, 1, 4).repeat_interleave(2)[:, None].expand(1, 1, 8, 8)
    assert float(CONTROLS["intensity"](rising)) == pytest.approx(0, abs=1e-12)


def test_values_by_hand():
    x = media(1)
    error = (x[0, :, :, :4] - REFERENCE[:, :, :4]).square().mean()
    assert float(CONTROLS["keep"](x)) == pytest.approx(float(error))
    mean = x[0, :, :, :4].mean((1, 2)) - torch.tensor([0.9, 0.1, 0.2])
    assert float(CONTROLS["colour"](x)) == pytest.approx(float(mean.square().mean()))
    assert float(CONTROLS["shows"](x)) == pytest.approx(-float((0.9 * x.mean()).log()))
    both = 2 * controls.colour((0.5, 0.5, 0.5))(x) + 0.5 * CONTROLS["keep"](x)
    torch.testing.assert_close(CONTROLS["together"](x), both)


def test_structure_ignores_the_overall_brightness_but_not_the_layout():
    control, x = controls.structure(REFERENCE, cells=2), REFERENCE[None]
    assert float(control(x.flip(-1))) > 20 * float(control(0.8 * x))


def spectrogram(seed=2):
    return torch.randn(2, 1, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_melodys_gradient_and_independence():
    assert torch.autograd.gradcheck(lambda x: MELODY(x), spectrogram().requires_grad_(True))
    torch.testing.assert_close(MELODY(spectrogram()), torch.cat([MELODY(part) for part in spectrogram().split(1)]))


def test_a_melody_is_the_share_of_energy_in_the_wanted_class():
    x = spectrogram()
    energy = (2 * x).exp().view(2, 3, 4, 8).mean(2)
    heard = energy[..., 1] + energy[..., 5], energy[..., 2], energy[..., 7]
    share = torch.stack(heard) / sum(heard)
    torch.testing.assert_close(MELODY(x), -(share[0, :, 0].log() + share[1, :, 2].log()) / 2)
    # Loudness is none of a melody's concern, nor is what sounds where there is no wish.
    torch.testing.assert_close(MELODY(x + 40.0), MELODY(x))
    other = x.clone()
    other[:, :, 4:8] = 0.1
    torch.testing.assert_close(MELODY(other), MELODY(x))


def test_a_melody_is_zero_where_it_is_heard():
    x = torch.full((1, 1, 12, 8), -20.0, dtype=torch.float64)
    x[:, :, :4, 5] = x[:, :, 8:, 2] = 1
    assert float(MELODY(x)) == pytest.approx(0, abs=1e-12)
    assert float(MELODY(x.flip(2))) > 10


def test_pitch_classes_of_mel_bins():
    # Slaney's scale has 15 mels at 1000 Hz: bins one mel apart lie 200/3 Hz apart below.
    table = controls.pitch_classes(14, highest=1000.0)
    assert table.sum(0).tolist() == [1.0] * 14
    # 466.7 Hz is nearest to A#4 (466.2 Hz), 866.7 Hz to A5 (880 Hz).
    assert [int(table[:, i].argmax()) for i in (6, 12)] == [10, 9]
    # Above it, a factor of 6.4 takes 27 mels: 41 bins up to 6400 Hz.
    high = controls.pitch_classes(41, highest=6400.0)
    hertz = 1000 * 6.4 ** (torch.arange(1, 27) / 27)
    expected = (69 + 12 * (hertz / 440).log2()).round().long() % 12
    assert torch.equal(high[:, 15:].argmax(0), expected)
    whole = controls.pitch_classes(64)
    assert bool((whole.sum(1) > 0).all()) and bool((whole.sum(0) <= 1).all())
    assert controls.pitch_classes(100, highest=1000.0)[:, :1].sum() == 0  # 10 Hz is no note


def test_luminance_weighs_colours_and_averages_other_channels():
    x = torch.zeros(1, 3, 2, 2)
    x[:, 1] = 1
    assert controls.luminance(x).flatten().tolist() == pytest.approx([0.587] * 4)
    assert controls.luminance(torch.arange(2.0).view(1, 2, 1, 1)).item() == 0.5


def test_what_cannot_be_asked_for_is_named():
    with pytest.raises(ValueError, match="keeps no pixel"):
        controls.keep(REFERENCE, torch.zeros(8, 8))
    with pytest.raises(ValueError, match="knows no light 'pink'; it knows dark, bright"):
        controls.shows(Brightness(), light="pink")
    with pytest.raises(ValueError, match="knows no shape 'round'; it knows light"):
        controls.shows(Brightness(), shape="round")
    with pytest.raises(ValueError, match="Say what shall be seen"):
        controls.shows(SimpleNamespace(groups={}))
    with pytest.raises(ValueError, match="has no note"):
        controls.melody([None], BINS)
    with pytest.raises(ValueError, match="sounds like pitch class 3"):
        controls.melody([0, 3], BINS)
    with pytest.raises(ValueError, match="make no scale"):
        controls.pitch_classes(8, lowest=90.0, highest=80.0)
    with pytest.raises(ValueError, match="no 16x16 parts"):
        controls.structure(REFERENCE, cells=16)
