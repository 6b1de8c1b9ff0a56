"""Models that see pictures besides text: inpainting and upscaling, against the stock pipelines' own preparation."""

import pytest
import torch
from pictures import pictures_for, shown_to

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.guidance import guided
from sublimate.pipelines.backbones.base import backbone_for
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model, open_model

PROMPTS = ["a red cat", "a dog"]


@pytest.fixture
def inpainting(tiny_inpainting):
    return open_model(tiny_inpainting)


@pytest.fixture
def upscaling(tiny_upscaling):
    return open_model(tiny_upscaling)


def draw(model):
    generator = torch.Generator().manual_seed(2)
    x_t = torch.randn((2, *model.latent_shape), generator=generator)
    return x_t, torch.tensor([700.0, 300.0], dtype=torch.float64)


@torch.no_grad()
def test_masks_and_masked_images_are_prepared_as_stock_does(inpainting):
    pipe, pictures = inpainting.pipeline, pictures_for(inpainting, 2)
    pictures["masks"][1, :, 9] = 0.3  # not painted: masks are binary
    shown = inpainting.show(**pictures)
    images = pipe.image_processor.preprocess(pictures["images"])
    masks = pipe.mask_processor.preprocess(pictures["masks"])
    mask, masked = pipe.prepare_mask_latents(
        masks, images * (masks < 0.5), 2, 16, 16, torch.float32, "cpu", None, False
    )
    assert torch.equal(shown["extra.mask"], mask)
    assert 0 < mask.mean() < 1
    torch.testing.assert_close(shown["extra.masked"], masked, atol=1e-5, rtol=0)
    one_mask = inpainting.show(images=pictures["images"], masks=pictures["masks"][:1])
    assert torch.equal(one_mask["extra.mask"], mask[:1].expand(2, -1, -1, -1))


@pytest.mark.slow
@torch.no_grad()
def test_prompts_alone_paint_everything(inpainting):
    condition, pictures = inpainting.encode_prompts(PROMPTS), pictures_for(inpainting, 2)
    everything = inpainting.show(images=pictures["images"], masks=torch.ones(1, 1, 16, 16))
    assert torch.equal(condition["extra.mask"], everything["extra.mask"])
    torch.testing.assert_close(condition["extra.masked"], everything["extra.masked"], atol=1e-6, rtol=0)
    drawn = generate(inpainting, PROMPTS, steps=2)
    torch.testing.assert_close(generate(inpainting, PROMPTS, steps=2, shown=everything), drawn)
    some = generate(inpainting, PROMPTS, steps=2, shown=shown_to(inpainting, 2), batch_size=1)
    assert not torch.equal(some, drawn)
    torch.testing.assert_close(generate(inpainting, PROMPTS, steps=2, shown=shown_to(inpainting, 2)), some)


@torch.no_grad()
def test_networks_see_pictures_beside_x_t(inpainting, upscaling):
    for model, keys in ((inpainting, ("extra.mask", "extra.masked")), (upscaling, ("extra.low_res",))):
        x_t, t = draw(model)
        condition = model.encode_prompts(PROMPTS).replace(**shown_to(model, 2))
        x_in = torch.cat([x_t, *(condition[key] for key in keys)], 1)
        level = {"class_labels": condition["extra.noise_level"]} if model is upscaling else {}
        expected = model.pipeline.unet(x_in, t.float(), encoder_hidden_states=condition["text"], **level).sample
        torch.testing.assert_close(model.denoiser(x_t, t, condition).output, expected, atol=0, rtol=0)


@torch.no_grad()
def test_guidance_replaces_the_text_alone(inpainting, upscaling):
    for model in (inpainting, upscaling):
        x_t, t = draw(model)
        shown, null = shown_to(model, 2), model.null_condition()
        condition = model.encode_prompts(PROMPTS).replace(**shown)
        without = model.encode_prompts(["", ""]).replace(**shown)
        y_null, y = model.denoiser(x_t, t, without).output, model.denoiser(x_t, t, condition).output
        found = guided(model.denoiser, x_t, t, condition, null, 3.0).output
        torch.testing.assert_close(found, y_null + 3 * (y - y_null), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_small_images_get_noise_of_the_level_that_is_told(upscaling):
    small, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    shown = upscaling.show(low_res=small, noise=noise, noise_level=torch.tensor([5, 30]))
    level = upscaling.pipeline.low_res_scheduler.alphas_cumprod[[5, 30]].view(-1, 1, 1, 1)
    torch.testing.assert_close(shown["extra.low_res"], level.sqrt() * (2 * small - 1) + (1 - level).sqrt() * noise)
    assert shown["extra.noise_level"].tolist() == [5, 30]
    x_t, t = draw(upscaling)
    condition = upscaling.encode_prompts(PROMPTS).replace(**shown)
    other = condition.replace(**{"extra.noise_level": torch.tensor([6, 30])})
    changed = upscaling.denoiser(x_t, t, condition).output != upscaling.denoiser(x_t, t, other).output
    assert bool(changed[0].any()) and not bool(changed[1].any())
    with pytest.raises(ValueError, match="from 0 to 35, not"):
        upscaling.show(low_res=small, noise=noise, noise_level=36)


def test_what_is_missing_or_does_not_fit_is_named(inpainting, upscaling, tiny_sd):
    pictures = pictures_for(inpainting, 2)
    x_t, t = draw(inpainting)
    with pytest.raises(ValueError, match=r"needs 'extra\.mask' and 'extra\.masked'"):
        inpainting.denoiser(x_t, t, Condition(text=inpainting.encode_prompts(PROMPTS)["text"]))
    with pytest.raises(ValueError, match=r"needs 'extra\.low_res'"):
        generate(upscaling, PROMPTS, steps=1)
    with pytest.raises(ValueError, match=r"picture of \(8, 8\) beside x_t of \(12, 16\)"):
        generate(inpainting, PROMPTS, steps=1, height=24, width=32)
    with pytest.raises(ValueError, match="do not fit images"):
        inpainting.show(images=pictures["images"], masks=pictures["masks"][:, :, :8])
    with pytest.raises(ValueError, match="told text alone"):
        open_model(tiny_sd).show(**pictures)
    with pytest.raises(ValueError, match="batch size 3 cannot serve 2"):
        generate(inpainting, PROMPTS, steps=1, shown=shown_to(inpainting, 3))


def test_what_stock_upscaling_cannot_be_told_is_refused(upscaling):
    few = FewSteps("consistency", steps=3, times=(999, 875, 251))
    with pytest.raises(ValueError, match="cannot be told timesteps"):
        upscaling.backbone.few_steps(upscaling.pipeline, few)
    with pytest.raises(ValueError, match="cannot be told the guidance scale"):
        upscaling.denoiser_with_number_input()


def test_an_inpainting_pipeline_without_mask_channels_is_refused(inpainting, tiny_sd):
    inpainting.pipeline.unet = open_model(tiny_sd).pipeline.unet
    with pytest.raises(ValueError, match="4 channels sees no mask"):
        Model(inpainting.pipeline, "odd")


def test_other_sizes_are_drawn_with_pictures_of_that_size(inpainting):
    shown = inpainting.show(images=torch.rand(1, 3, 24, 32), masks=torch.ones(1, 1, 24, 32))
    assert generate(inpainting, PROMPTS, steps=1, height=24, width=32, shown=shown).shape == (2, 3, 24, 32)


def test_both_are_found_by_their_pipelines():
    assert backbone_for("StableDiffusionInpaintPipeline").shown == "masks"
    assert backbone_for("StableDiffusionUpscalePipeline").shown == "low_res"
    assert backbone_for("StableDiffusionPipeline").shown == ""
