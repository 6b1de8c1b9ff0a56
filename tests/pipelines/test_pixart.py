"""What sets PixArt apart: text masked and projected, a variance that is not used, sizes that a network is told."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, PixArtTransformer2DModel

from sublimate.pipelines.generate import generate, generate_latents
from sublimate.pipelines.model import Model, open_model
from sublimate.pipelines.sampling import image_generator

FAMILIES = ("tiny_pixart", "tiny_pixart_sigma")
PROMPTS = ["A red Cat", "a painting in the style of van gogh", " dog"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return open_model(request.getfixturevalue(request.param))


def stock(model, prompts, **options):
    """What the stock pipeline draws with trailing DDIM steps and the noise of seed 9."""
    pipeline, own = model.pipeline, model.pipeline.scheduler
    pipeline.scheduler = DDIMScheduler.from_config(
        own.config, timestep_spacing="trailing", clip_sample=False, steps_offset=1
    )
    pipeline.set_progress_bar_config(disable=True)
    generators = [image_generator(9, i) for i in range(len(prompts))]
    as_asked = {"clean_caption": False, "use_resolution_binning": False, "output_type": "pt"}
    try:
        return pipeline(prompts, generator=generators, **{**as_asked, **options}).images
    finally:
        pipeline.scheduler = own


@torch.no_grad()
@pytest.mark.parametrize("options", [{"guidance_scale": 1.0}, {}, {"negative_prompt": "A dog"}])
def test_drawing_agrees_with_the_stock_pipeline(model, options):
    ours = generate(model, PROMPTS, steps=3, seed=9, **options)
    torch.testing.assert_close(stock(model, PROMPTS, num_inference_steps=3, **options), ours, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.slow
def test_a_latent_consistency_model_opens_as_the_student_it_is(model, tmp_path):
    pipeline = copy.copy(model.pipeline)
    pipeline.scheduler = LCMScheduler.from_config(model.pipeline.scheduler.config, original_inference_steps=50)
    pipeline.save_pretrained(tmp_path / "lcm")
    student = open_model(tmp_path / "lcm")
    assert student.is_student and student.guidance_scale == 1 and not model.is_student
    student.pipeline.set_progress_bar_config(disable=True)
    generators = [image_generator(9, i) for i in range(len(PROMPTS))]
    expected = student.pipeline(PROMPTS, generator=generators, output_type="pt", **student.defaults["call"]).images
    # Stock keeps c_skip of x_t.
    torch.testing.assert_close(generate(student, PROMPTS, seed=9), expected, atol=2e-5, rtol=0)
    assert student.defaults["call"]["use_resolution_binning"] is False


@torch.no_grad()
def test_other_sizes_agree_with_the_stock_pipeline(model):
    size = {"height": 24, "width": 32}
    ours = generate(model, PROMPTS, steps=2, seed=9, **size)
    assert ours.shape == (3, 3, 24, 32)
    torch.testing.assert_close(stock(model, PROMPTS, num_inference_steps=2, **size), ours, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="multiple of 4 pixels, not 18"):
        generate(model, PROMPTS, height=18)


@torch.no_grad()
def test_the_prediction_is_the_first_half_of_the_output(model):
    x_t, t, condition = torch.randn(3, 4, 8, 8), 500, model.encode_prompts(PROMPTS)
    y = model.pipeline.transformer(
        x_t,
        encoder_hidden_states=condition["text"],
        encoder_attention_mask=condition["text.mask"],
        timestep=torch.full((3,), t),
    ).sample
    assert y.shape[1] == 8
    assert torch.equal(model.denoiser(x_t, t, condition).eps, y[:, :4])


@torch.no_grad()
def test_what_is_no_token_is_masked(model):
    x_t, condition = torch.randn(3, 4, 8, 8), model.encode_prompts(PROMPTS)
    noisy = torch.where(condition["text.mask"][..., None] == 1, condition["text"], 100.0)
    changed = model.denoiser(x_t, 500, condition.replace(text=noisy))
    torch.testing.assert_close(changed.output, model.denoiser(x_t, 500, condition).output, atol=1e-6, rtol=0)


def test_prompts_are_read_in_lower_case_and_up_to_their_end(model):
    plain, spelled = model.encode_prompts(["a red cat", " A red CAT "])["text"]
    assert torch.equal(plain, spelled)
    (span,) = model.find_concept(" A red Cat", "Cat")
    assert (span.start, span.stop, span.end, span.last) == (2, 3, 3, 4)
    (span,) = model.prompt_rows("A red cat")
    assert (span.start, span.stop, span.last) == (0, 3, 4)
    assert model.encode_prompts(["a"])["text"].shape[1] == {"PixArtAlphaPipeline": 120}.get(
        type(model.pipeline).__name__, 300
    )


@torch.no_grad()
def test_a_network_for_1024_pixels_is_told_sizes_as_in_the_stock_pipeline(tiny_pixart):
    pipeline = open_model(tiny_pixart).pipeline
    # Embeddings of three numbers side by side, so a width that three divides.
    large = {"sample_size": 128, "patch_size": 16, "attention_head_dim": 12, "cross_attention_dim": 24}
    pipeline.transformer = PixArtTransformer2DModel.from_config(pipeline.transformer.config, **large)
    with pytest.raises(ValueError, match="8 pixels per latent, not 2"):
        Model(pipeline, "large")
    pipeline.vae_scale_factor = 8
    model = Model(pipeline, "large")
    for size in ({}, {"height": 512, "width": 768}):
        ours = generate_latents(model, PROMPTS, steps=2, seed=9, **size)
        drawn = stock(model, PROMPTS, num_inference_steps=2, output_type="latent", **size)
        # At the end of this schedule x0 is 158 times what rounding makes of the noise.
        torch.testing.assert_close(drawn, ours, atol=1e-3, rtol=0)
    # What it is told matters: another ratio of the same patches draws something else.
    x_t, t, condition = torch.randn(1, 4, 64, 96), 500, model.encode_prompts(["a cat"])
    told = {"resolution": torch.tensor([[512.0, 768.0]]), "aspect_ratio": torch.tensor([[1.0]])}
    other = pipeline.transformer(
        x_t, condition["text"], torch.tensor([t]), told, encoder_attention_mask=condition["text.mask"]
    ).sample[:, :4]
    assert not torch.allclose(other, model.denoiser(x_t, t, condition).eps, atol=1e-5)
