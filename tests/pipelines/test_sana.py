"""What sets Sana apart: a flow, Gemma's masked text without a preamble, linear attention, LoRAs that stock loads."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from students import SEEDS, images_of, prompts_of, with_lora

from sublimate.pipelines.export import export_lora
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.pipelines.negative_attention import install_negative_attention
from sublimate.pipelines.sampling import image_generator

PROMPTS = ["A red Cat", "a painting in the style of van gogh", " dog"]


@pytest.fixture(scope="module")
def model(tiny_sana):
    return open_model(tiny_sana)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"guidance_scale": 1.0}, {}, {"negative_prompt": "A dog"}, {"width": 64}])
def test_drawing_agrees_with_the_stock_pipeline(model, options):
    ours = generate(model, PROMPTS, steps=3, seed=9, **options)
    pipeline = SanaPipeline(**{**model.pipeline.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)})
    pipeline.set_progress_bar_config(disable=True)
    plain = {"clean_caption": False, "use_resolution_binning": False, "complex_human_instruction": None}
    stock = pipeline(
        PROMPTS,
        sigmas=[1, 2 / 3, 1 / 3],
        generator=[image_generator(9, i) for i in range(3)],
        output_type="pt",
        **{"height": 32, "width": 32, **plain, **options},
    )
    torch.testing.assert_close(ours, stock.images, atol=2e-5, rtol=0)


@torch.no_grad()
def test_flow_algebra(model):
    x_t, t = torch.randn(3, 4, 8, 8), torch.tensor([1.0, 0.6, 0.1])
    condition = model.encode_prompts(PROMPTS)
    velocity = model.pipeline.transformer(
        x_t, condition["text"], 1000 * t, encoder_attention_mask=condition["text.mask"]
    ).sample
    x0 = x_t - t.view(-1, 1, 1, 1) * velocity
    torch.testing.assert_close(model.denoiser(x_t, t, condition).x0, x0, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_timestep_scale_is_the_networks(model):
    x_t, condition = torch.randn(3, 4, 8, 8), model.encode_prompts(PROMPTS)
    expected = model.denoiser(x_t, 0.8, condition).output
    config = model.pipeline.transformer.config
    model.pipeline.transformer.register_to_config(timestep_scale=2.0)
    try:
        torch.testing.assert_close(model.denoiser(x_t, 0.4, condition).output, expected, atol=1e-5, rtol=0)
    finally:
        model.pipeline.transformer.register_to_config(timestep_scale=config.timestep_scale)


@torch.no_grad()
def test_what_is_no_token_is_masked(model):
    x_t, condition = torch.randn(3, 4, 8, 8), model.encode_prompts(PROMPTS)
    noisy = torch.where(condition["text.mask"][..., None] == 1, condition["text"], 100.0)
    changed = model.denoiser(x_t, 0.5, condition.replace(text=noisy))
    torch.testing.assert_close(changed.output, model.denoiser(x_t, 0.5, condition).output, atol=1e-6, rtol=0)


@torch.no_grad()
def test_prefixes_of_prompts_are_encoded_alone(model):
    whole, part = model.encode_prompts(PROMPTS), model.encode_prefixes(PROMPTS, 3)
    assert part["text"].shape[1] == part["text.mask"].shape[1] == 3
    torch.testing.assert_close(part["text"], whole["text"][:, :3], atol=1e-5, rtol=0)


def test_rows_of_prompts_have_a_start_and_no_end_token(model):
    (span,) = model.prompt_rows("A red cat")
    assert (span.start, span.stop, span.end, span.last) == (1, 4, 3, 4)
    (span,) = model.prompt_rows("")
    assert (span.start, span.stop, span.end, span.last) == (1, 1, 0, 1)


def test_concepts_are_found_with_and_without_a_space_before_them(model):
    for prompt, rows in (("Cat in red", slice(1, 2)), ("a red cat", slice(3, 4)), ("bobcat, (cat)", slice(8, 9))):
        assert model.find_concept(prompt, "cat")[0].rows == rows
    with pytest.raises(ValueError, match="does not mention 'cat'"):
        model.find_concept("a bobcat", "cat")


def test_a_students_scheduler_keeps_the_shift(model):
    # One step starts at 1 whatever the shift is, but who opens the student trains and draws by it.
    assert model.backbone.one_step(model.pipeline).scheduler.config.shift == model.schedule.shift == 3.0


def test_what_its_attention_cannot_be_told_is_refused(model):
    with pytest.raises(ValueError, match="tells its attention nothing but the text"):
        install_negative_attention(model.denoiser.network)


@pytest.mark.slow
def test_a_stock_pipeline_loads_a_students_lora(model, tiny_sana, tmp_path):
    student = with_lora(model, {"transformer_blocks.0.attn2.to_k": 3})
    folder = export_lora(model, student, tmp_path / "lora")
    pipeline = SanaPipeline.from_pretrained(tiny_sana)
    pipeline.load_lora_weights(folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    call = json.loads((folder / "sublimate.json").read_text())["call"]
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    drawn = pipeline(prompts_of(model), generator=generators, output_type="pt", **call).images
    torch.testing.assert_close(drawn, images_of(model, student, None), atol=1e-5, rtol=0)
    plain = images_of(model, model.denoiser, None)
    assert not torch.allclose(plain, images_of(model, student, None), atol=1e-3)
