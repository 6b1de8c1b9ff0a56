"""Stable Diffusion XL against its stock pipeline: the sizes it is told, its pooled path, its autoencoder."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from students import with_lora

from sublimate.diffusion.conditions import Condition
from sublimate.erasure.eraser import Eraser
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines import controls
from sublimate.pipelines.backbones.sdxl import POOLED, TIME_IDS
from sublimate.pipelines.ditto import ditto
from sublimate.pipelines.export import export_lora, export_student
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model, open_model
from sublimate.pipelines.sampling import image_generator
from sublimate.pipelines.shapes import open_shapes
from sublimate.training import registry

PROMPTS = ["a red cat", "a painting of van gogh"]
ONE = {"sampler": "one_step", "guidance_scale": 1.0}
LAYER = "unet/add_embedding.linear_1.weight"


@pytest.fixture
def model(tiny_sdxl) -> Model:
    return open_model(tiny_sdxl)


def stock(model: Model, **options) -> torch.Tensor:
    """What the stock pipeline draws of the same noise with the sampler that `generate` uses."""
    pipeline = model.pipeline
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    generators = [image_generator(0, i) for i in range(len(PROMPTS))]
    return pipeline(PROMPTS, num_inference_steps=2, generator=generators, output_type="pt", **options).images


def test_the_size_that_is_drawn_is_told(model):
    ours = generate(model, PROMPTS, steps=2, height=24, width=32)
    torch.testing.assert_close(ours, stock(model, height=24, width=32), atol=2e-5, rtol=0)
    assert model.encode_prompts([""])[TIME_IDS].tolist() == [[16, 16, 0, 0, 16, 16]]


def test_other_sizes_can_be_told(model):
    sizes = Condition({TIME_IDS: torch.tensor([[64.0, 48.0, 3.0, 5.0, 16.0, 16.0]])})
    ours = generate(model, PROMPTS, steps=2, shown=sizes)
    told = {"original_size": (64, 48), "crops_coords_top_left": (3, 5)}
    torch.testing.assert_close(ours, stock(model, **told), atol=2e-5, rtol=0)
    assert not torch.allclose(ours, generate(model, PROMPTS, steps=2), atol=1e-4)


def test_a_surrogate_is_told_the_size_that_is_drawn(model):
    found = ditto(model, PROMPTS, controls.colour((0.5, 0.5, 0.5)), iterations=0, height=24, **ONE)
    torch.testing.assert_close(model.bounded(found.surrogate_images), found.images, atol=2e-5, rtol=0)


@pytest.mark.parametrize("negative", ["", "a dog"])
def test_a_negative_prompt_is_encoded_where_no_text_is_zeros(model, negative):
    ours = generate(model, PROMPTS, steps=2, negative_prompt=negative)
    torch.testing.assert_close(ours, stock(model, negative_prompt=[negative] * 2), atol=2e-5, rtol=0)
    assert not torch.allclose(ours, generate(model, PROMPTS, steps=2), atol=1e-4)


@pytest.mark.parametrize("predicted", ["epsilon", "v_prediction"])
def test_edms_schedulers_precondition_the_network(model, tiny_sdxl, tmp_path, predicted):
    model.pipeline.scheduler = EDMEulerScheduler(sigma_max=20.0, prediction_type=predicted)
    model.pipeline.save_pretrained(tmp_path / "edm")
    edm = open_model(tmp_path / "edm")
    assert edm.denoiser.parametrization.kind == {"epsilon": "edm", "v_prediction": "trigflow"}[predicted]
    ours = generate(edm, PROMPTS, steps=4, guidance_scale=2.0)
    pipeline, generators = edm.pipeline, [image_generator(0, i) for i in range(len(PROMPTS))]
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(PROMPTS, num_inference_steps=4, guidance_scale=2.0, generator=generators, output_type="pt").images
    torch.testing.assert_close(ours, drawn, atol=5e-5, rtol=0)
    assert not torch.allclose(ours, generate(open_model(tiny_sdxl), PROMPTS, steps=4, guidance_scale=2.0), atol=1e-2)
    with pytest.raises(ValueError, match="EDMEulerScheduler has no table of betas"):
        export_student(edm, edm.denoiser, tmp_path / "student")


@torch.no_grad()
def test_an_autoencoder_may_normalise_its_latents_by_channel(model):
    plain = generate(model, PROMPTS, steps=2)
    mean, deviation = [0.5, -1.0, 0.2, 0.0], [0.7, 1.3, 2.0, 0.4]
    model.pipeline.vae.register_to_config(latents_mean=mean, latents_std=deviation)
    ours = generate(model, PROMPTS, steps=2)
    torch.testing.assert_close(ours, stock(model), atol=2e-5, rtol=0)
    assert not torch.allclose(ours, plain, atol=1e-2)
    image = torch.rand(1, 3, 16, 16)
    mode = model.pipeline.vae.encode(2 * image - 1).latent_dist.mode()
    m, d = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, deviation))
    expected = (mode - m) / d * model.pipeline.vae.config.scaling_factor
    torch.testing.assert_close(model.encode(image), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["uce", "rece", "mace_fusion", "speed"])
def test_closed_forms_edit_the_pooled_path_beside_keys_and_values(model, method):
    request = Request(Concept("cat", anchor="dog"), preserve=["seven"])
    edit = registry.load("sublimate.erasure.methods", method, Eraser)().fit(model, request, seed=0)
    before = model.parameters()[LAYER].clone()
    cat, dog = model.encode_prompts(["cat", "dog"])[POOLED]
    edit.apply(model)
    change = model.parameters()[LAYER] - before
    assert bool(change[:, : len(cat)].any()) and not change[:, len(cat) :].any()
    missing, had = ((before[:, : len(cat)] + change[:, : len(cat)] * on) @ cat for on in (1, 0))
    aim = before[:, : len(cat)] @ dog
    assert float((missing - aim).norm()) < 0.7 * float((had - aim).norm())
    assert any(key.endswith("attn2.to_v.weight") for key in edit.shapes())


@pytest.mark.slow
def test_a_lora_loads_into_the_stock_pipeline(model, tiny_sdxl, tmp_path):
    student = with_lora(model, {})
    folder = export_lora(model, student, tmp_path / "lora")
    plain = open_model(tiny_sdxl)
    plain.pipeline.load_lora_weights(folder)
    model.denoiser = student
    drawn = stock(plain, guidance_scale=2.0)
    torch.testing.assert_close(drawn, generate(model, PROMPTS, steps=2, guidance_scale=2.0), atol=2e-5, rtol=0)


def test_parts_of_another_family_are_refused(tiny_sd, tiny_sdxl, tmp_path):
    mixed = shutil.copytree(tiny_sdxl, tmp_path / "mixed")
    shutil.rmtree(mixed / "unet")
    shutil.copytree(tiny_sd / "unet", mixed / "unet")
    with pytest.raises(
        ValueError, match=r"UNet of this StableDiffusionXLPipeline reads text of width .* for .*text_time"
    ):
        open_model(mixed)
    with pytest.raises(ValueError, match="parts of different families are in one checkpoint"):
        open_shapes(mixed)


def test_a_condition_without_sizes_is_refused(model):
    told = Condition({key: value for key, value in model.encode_prompts(["a cat"]).items() if key != TIME_IDS})
    with pytest.raises(ValueError, match=r"needs a text condition and 'extra\.time_ids'"):
        model.denoiser(torch.zeros(1, *model.latent_shape), 10, told)
