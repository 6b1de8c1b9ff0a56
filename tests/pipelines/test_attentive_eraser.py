"""Attentive Eraser against its parts put together by hand, what it keeps, and what it refuses."""

import contextlib
import itertools

import pytest
import torch
from torch import nn

from sublimate.diffusion.predictions import add_noise
from sublimate.diffusion.samplers import ddim
from sublimate.pipelines import attentive_eraser
from sublimate.pipelines.attentive_eraser import dilated, erase_object
from sublimate.pipelines.model import open_model
from sublimate.pipelines.negative_attention import attention_layers
from sublimate.pipelines.redirection import redirected
from sublimate.pipelines.sampling import initial_noise


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


IMAGES = uniform(2, 3, 16, 24)
MASKS = torch.zeros(2, 1, 16, 24)
MASKS[0, 0, 4:9, 6:11] = 1
MASKS[1, 0, 13, 20] = 1
FEW = {"steps": 5, "first_layer": 0.0, "first_step": 0.0}


@pytest.fixture(params=("tiny_sd", "tiny_sd_v", "tiny_sdxl_v"))
def model(request):
    return open_model(request.getfixturevalue(request.param))


@pytest.fixture
def plain_model(tiny_sd):
    return open_model(tiny_sd)


def untold(model):
    """No text, and the size of the images."""
    return model.null_condition().replace(**model.backbone.sizes(model.pipeline, 16, 24))


def hole():
    return nn.functional.max_pool2d(MASKS, 2)


def blended(model, grid, step):
    """Sampling within the mask from noised images, with `step` from one time to the next."""
    with torch.no_grad():
        x0 = model.encode(IMAGES)
        z = initial_noise(x0.shape[1:], 0, range(2))
        x = add_noise(model.schedule, x0, z, grid[0])
        for t, to in itertools.pairwise(grid):
            x = torch.where(hole() > 0, step(x, t, to), add_noise(model.schedule, x0, z, to))
        return model.render(x)


def test_without_guidance_it_is_plain_sampling_within_the_mask(model):
    null, grid = untold(model), model.schedule.grid(5)[1:]

    def step(x, t, to):
        return ddim(lambda x_t, t: model.denoiser(x_t, t, null), x, model.schedule, [t, to])

    found = erase_object(model, IMAGES, MASKS, **FEW, scale=0.0, paste=False)
    torch.testing.assert_close(found, blended(model, grid, step), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_guidance_leads_from_plain_to_redirected_attention(model):
    """Each branch in a pass of its own, eps put together as the paper has it."""
    null, grid = untold(model), model.schedule.grid(5)[1:]
    places = iter(range(4))

    def step(x, t, to):
        eps_wo = model.denoiser(x, t, null).eps
        with redirected(model.denoiser.network) as redirection:
            redirection.objects, redirection.similarity = hole(), 0.3 if next(places) < 2 else 1.0
            eps_w = model.denoiser(x, t, null).eps
        eps = eps_wo + 9 * (eps_w - eps_wo)
        (alpha, sigma, *_), (alpha_to, sigma_to, *_) = model.schedule.at(t), model.schedule.at(to)
        return (alpha_to * (x - sigma * eps) / alpha + sigma_to * eps).float()

    found = erase_object(model, IMAGES, MASKS, **FEW, suppressed=0.4, paste=False)
    expected = blended(model, grid, step)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - erase_object(model, IMAGES, MASKS, **FEW, scale=0.0, paste=False)).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("tiny_sd", {"first_step": 4 / 50, "first_layer": 10 / 16}),
        ("tiny_sdxl_v", {"first_step": 0.0, "first_layer": 34 / 70}),
    ],
)
def test_settings_are_the_authors_of_the_family(request, family, settings, monkeypatch):
    model, asked = open_model(request.getfixturevalue(family)), []

    @contextlib.contextmanager
    def noting(network, first):
        asked.append(first)
        with redirected(network, first=first) as redirection:
            yield redirection

    monkeypatch.setattr(attentive_eraser, "redirected", noting)
    usual, told = (erase_object(model, IMAGES, MASKS, steps=25, strength=0.2, **some) for some in ({}, settings))
    assert asked == [settings["first_layer"]] * 2 and torch.equal(usual, told)


def test_a_scale_of_one_is_redirected_attention_alone(plain_model):
    found = [erase_object(plain_model, IMAGES, MASKS, **FEW, scale=scale) for scale in (1.0, 1.0 + 1e-6)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, same_as",
    [
        ({"suppressed": 0.0}, {"similarity": 1.0}),
        ({"first_step": 1.0}, {"scale": 0.0}),
        ({"first_layer": 1.0}, {"scale": 0.0}),
    ],
    ids=str,
)
def test_options_that_leave_a_part_out(plain_model, change, same_as):
    found, expected, all_of_it = (
        erase_object(plain_model, IMAGES, MASKS, **{**FEW, **options}) for options in (change, same_as, {})
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - all_of_it).abs().max() > 1e-4


@pytest.mark.parametrize("inversion", ("noise", "ddim"))
def test_what_is_not_masked_is_kept(plain_model, inversion):
    """In latent space by blending, bit for bit; in the image by putting its pixels back."""
    drawn = []
    handle = plain_model.pipeline.vae.post_quant_conv.register_forward_pre_hook(
        lambda _, args: drawn.append(args[0] * plain_model.pipeline.vae.config.scaling_factor)
    )
    found = erase_object(plain_model, IMAGES, MASKS, **FEW, inversion=inversion)
    handle.remove()
    outside = (MASKS == 0).expand_as(IMAGES)
    assert torch.equal(found[outside], IMAGES[outside]) and not torch.equal(found, IMAGES)
    kept = (hole() == 0).expand_as(drawn[0])
    torch.testing.assert_close(drawn[0][kept], plain_model.encode(IMAGES)[kept], rtol=1e-6, atol=1e-6)
    assert (drawn[0] - plain_model.encode(IMAGES)).abs()[~kept].max() > 1e-2


def transposed(model):
    """Kernels turned over, so that networks do to a transposed image what they did to the image."""
    for part in model.components().values():
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.mT.contiguous()
    return model


@pytest.mark.slow
def test_a_transposed_image_gives_the_transposed_result(tiny_sd):
    wide, tall = (open_model(tiny_sd).to(dtype=torch.float64) for _ in range(2))
    found = erase_object(wide, IMAGES, MASKS, **FEW, inversion="ddim")
    turned = erase_object(transposed(tall), IMAGES.mT, MASKS.mT, **FEW, inversion="ddim")
    torch.testing.assert_close(turned.mT, found, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_image_depends_on_its_seed_and_place_alone(plain_model):
    together = erase_object(plain_model, IMAGES, MASKS, **FEW, seed=3)
    apart = erase_object(plain_model, IMAGES, MASKS, **FEW, seed=3, batch_size=1)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert not torch.equal(together, erase_object(plain_model, IMAGES, MASKS, **FEW, seed=4))


def test_the_model_is_left_as_it_was_also_after_an_error(plain_model):
    layers = attention_layers(plain_model.denoiser.network)
    before = {name: layer.processor for name, layer in layers.items()}
    bits, state = plain_model.content_hash(), torch.get_rng_state()
    erase_object(plain_model, IMAGES, MASKS, **FEW)
    handle = plain_model.denoiser.network.conv_out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        erase_object(plain_model, IMAGES, MASKS, **FEW)
    handle.remove()
    assert all(layer.processor is before[name] for name, layer in layers.items())
    assert plain_model.content_hash() == bits and torch.equal(torch.get_rng_state(), state)


def test_dilation_moves_edges_and_keeps_thin_lines():
    edge = torch.zeros(1, 1, 40, 80)
    edge[..., 40:] = 1
    # The standard normal distribution falls to 0.1 at 1.28 standard deviations.
    assert int(dilated(edge, 10.0)[0, 0, 20].argmax()) == 40 - 13
    line = torch.zeros(1, 1, 40, 80)
    line[..., 20, :] = 1
    assert torch.equal(dilated(line, 10.0), line)
    assert dilated(line, 2.0).sum() > line.sum() and torch.equal(dilated(line, 0), line)


def test_dilation_widens_what_is_drawn_anew(plain_model):
    narrow, wide = (erase_object(plain_model, IMAGES, MASKS, **FEW, dilation=width) != IMAGES for width in (0, 1.5))
    assert not (narrow & ~wide).any() and wide.sum() > narrow.sum()


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"masks": torch.zeros(1, 1, 16, 24)}, "empty"),
        ({"masks": torch.ones(1, 1, 16, 24)}, "leave some background"),
        ({"masks": (torch.arange(24) < 20).expand(1, 1, 16, 24).float(), "dilation": 4.0}, "leave some background"),
        ({"masks": MASKS[..., :20]}, r"\(16, 20\) do not fit 2 images of \(16, 24\)"),
        ({"masks": MASKS.expand(2, 3, 16, 24)}, "Give images"),
        ({"masks": MASKS * 255}, "8-bit"),
        ({"images": IMAGES - 0.5}, "images have values outside"),
        ({"images": IMAGES * torch.nan}, "images have values outside"),
        ({"images": IMAGES[..., :23], "masks": MASKS[..., :23]}, "multiple of 2 pixels, not 23"),
        ({"strength": 0.0}, "strength in"),
        ({"similarity": 1.5}, "similarity is a share"),
        ({"scale": float("nan")}, "scale of redirection"),
        ({"inversion": "sde"}, "no inversion 'sde'"),
        ({"dilation": -1.0}, "dilation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_sentence(plain_model, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        erase_object(plain_model, **{"images": IMAGES, "masks": MASKS, **change})


@pytest.mark.parametrize("family", ("tiny_unconditional", "tiny_inpainting", "tiny_sd3"))
def test_other_families_are_refused(request, family):
    with pytest.raises(ValueError, match=r"Stable Diffusion 1\.x, 2\.x or XL"):
        erase_object(open_model(request.getfixturevalue(family)), IMAGES, MASKS)


def test_students_are_refused():
    with pytest.raises(ValueError, match="open its teacher"):
        erase_object(open_model("ink_one_step"), IMAGES, MASKS)
