"""Latent consistency models and Turbo, in folders that nobody made for this library, against stock pipelines."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from checkpoints.sdxl import euler, sdxl
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler

from sublimate.erasure.methods.one_step import OneStep
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines import controls
from sublimate.pipelines.ditto import ditto
from sublimate.pipelines.export import export_student, save_model
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model, open_model
from sublimate.pipelines.published_students import published_defaults
from sublimate.pipelines.sampling import image_generator

PROMPTS = ["a red cat", "a painting of van gogh"]
TOLD = ("tiny_lcm", "tiny_sdxl_lcm")
TURBO = ("tiny_sd_turbo", "tiny_sdxl_turbo")
STUDENTS = (*TOLD, *TURBO)


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> dict[str, Model]:
    return {name: open_model(request.getfixturevalue(name)) for name in STUDENTS}


def stock(model: Model, **options) -> torch.Tensor:
    """What the stock pipeline draws, with its own scheduler, of the same noise."""
    model.pipeline.set_progress_bar_config(disable=True)
    generators = [image_generator(0, i) for i in range(len(PROMPTS))]
    return model.pipeline(PROMPTS, generator=generators, output_type="pt", **options).images


@pytest.mark.parametrize("name", STUDENTS)
def test_the_folder_says_that_it_is_a_student(models, name):
    model = models[name]
    assert model.is_student
    assert model.guidance_scale == (8.0 if name in TOLD else 1.0)
    assert model.backbone.reads_guidance(model.denoiser.network) == (name in TOLD)


@pytest.mark.parametrize("options", [{}, {"steps": 1}, {"steps": 3, "guidance_scale": 3.0}])
@pytest.mark.parametrize("name", TOLD)
def test_a_latent_consistency_model_draws_as_stock_does(models, name, options):
    call = {"num_inference_steps": options.get("steps", 4), "guidance_scale": options.get("guidance_scale", 8.0)}
    expected = stock(models[name], **call)
    # Stock keeps c_skip of x_t.
    torch.testing.assert_close(generate(models[name], PROMPTS, **options), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("steps", [None, 2, 4])
@pytest.mark.parametrize("name", TURBO)
def test_turbo_draws_as_stock_does(models, name, steps):
    expected = stock(models[name], num_inference_steps=steps or 1, guidance_scale=0.0)
    torch.testing.assert_close(generate(models[name], PROMPTS, steps=steps), expected, atol=1e-4, rtol=0)


def test_a_surrogate_starts_from_the_noise_that_is_drawn_from(models):
    model = models["tiny_sd_turbo"]
    found = ditto(model, PROMPTS, controls.colour((0.5, 0.5, 0.5)), iterations=0)
    torch.testing.assert_close(model.bounded(found.surrogate_images), found.images, atol=1e-5, rtol=0)


def test_turbo_can_be_guided(models):
    expected = stock(models["tiny_sd_turbo"], num_inference_steps=2, guidance_scale=3.0)
    ours = generate(models["tiny_sd_turbo"], PROMPTS, steps=2, guidance_scale=3.0)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        euler(),
        EulerDiscreteScheduler(timestep_spacing="trailing", prediction_type="v_prediction"),
        EulerDiscreteScheduler(timestep_spacing="trailing", rescale_betas_zero_snr=True),
        EulerDiscreteScheduler(timestep_spacing="trailing", use_karras_sigmas=True),
        DDIMScheduler(timestep_spacing="trailing"),
    ],
)
def test_other_schedulers_make_no_student(models, scheduler):
    assert published_defaults(scheduler, models["tiny_sdxl_turbo"].schedule, told_guidance=False) == {}


def test_a_consistency_model_that_is_told_nothing_is_not_guided():
    model = Model(sdxl(LCMScheduler(original_inference_steps=40)), "fused LoRA")
    defaults = model.backbone.published_defaults(model.pipeline)
    assert (defaults["guidance_scale"], defaults["few_steps"]["guidance_scale"]) == (1.0, 1.0)
    assert defaults["few_steps"]["grid_steps"] == 40


@pytest.mark.parametrize("name", ["tiny_lcm", "tiny_sdxl_turbo"])
def test_the_folders_own_word_goes_first(request, tmp_path, name):
    folder = shutil.copytree(request.getfixturevalue(name), tmp_path / "own")
    (folder / "sublimate.json").write_text(json.dumps({"steps": 12, "guidance_scale": 3.0}))
    model = open_model(folder)
    assert model.defaults == {"steps": 12, "guidance_scale": 3.0} and not model.is_student


@pytest.mark.parametrize("name", STUDENTS)
def test_an_edited_student_stays_one(models, tmp_path, name):
    model = models[name]
    folder = save_model(model, tmp_path / "edited")
    again = open_model(folder)
    assert again.is_student and torch.equal(generate(again, PROMPTS), generate(model, PROMPTS))
    steps, scale = (4, 8.0) if name in TOLD else (1, 1.0)
    assert f"num_inference_steps={steps}, guidance_scale={scale}" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["tiny_lcm", "tiny_sdxl_turbo"])
def test_what_was_tuned_from_a_student_is_sampled_as_it_is(models, tmp_path, name):
    again = open_model(export_student(models[name], models[name].denoiser, tmp_path / "tuned", as_base=True))
    assert again.is_student and torch.equal(generate(again, PROMPTS), generate(models[name], PROMPTS))


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_a_concept_is_erased_at_the_students_own_times(request, name):
    model = open_model(request.getfixturevalue(name))
    with torch.no_grad():
        # What random weights make of the prompt is faint.
        for key, weight in model.parameters().items():
            weight.mul_(20 if key.endswith("attn2.to_out.0.weight") else 1)
    eraser = OneStep(max_train_steps=20, train_batch_size=8, learning_rate=1e-3, weights="x")
    before, aim = (generate(model, [word] * 8) for word in ("cat", "dog"))
    with eraser.fit(model, Request(Concept("cat", anchor="dog")), seed=0).applied(model):
        after = generate(model, ["cat"] * 8)
    assert float((after - aim).square().mean()) < 0.3 * float((before - aim).square().mean())
