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


def media(count=2, seed=1):
    return torch.rand(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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
    with pytest.raises(ValueError, match="no 16x16 parts"):
        controls.structure(REFERENCE, cells=16)
