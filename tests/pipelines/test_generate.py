"""Generation: noise by seed and place, agreement with stock pipelines, guidance, and options that do not fit."""

from __future__ import annotations

import json
import shutil
from inspect import signature
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from opened import Opened

from sublimate.diffusion.denoisers import Denoiser
from sublimate.pipelines.generate import SAMPLERS, SamplingOptions, choose_sampling, generate, generate_latents
from sublimate.pipelines.model import Model, open_model
from sublimate.pipelines.sampling import at_once, image_generator, initial_noise

FAMILIES = (
    "tiny_sd",
    "tiny_sd_v",
    "tiny_unconditional",
    "tiny_edm",
    "tiny_edm_classes",
    "tiny_dit",
    "tiny_sd3",
    "tiny_sdxl",
)
PROMPTS = ["a red cat", "a dog", "the style of van gogh", "a painting in red", ""]


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> dict[str, Model]:
    return Opened(request)


def prompts_of(model: Model):
    if model.backbone.text_components:
        return PROMPTS
    return ["7", "2", "5", "2", "0"] if model.any_condition() else len(PROMPTS)


class Passes:
    """Counts the samples that pass through a denoiser."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        forward = Denoiser.forward

        def counted(denoiser, x_t, *args, **kwargs):
            self.batches.append(len(x_t))
            return forward(denoiser, x_t, *args, **kwargs)

        monkeypatch.setattr(Denoiser, "forward", counted)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_batch_size_changes_nothing(models, name):
    model = models[name]
    whole = generate(model, prompts_of(model), steps=2, seed=4)
    assert whole.shape == (5, 3, *whole.shape[2:])
    assert whole.dtype == torch.float32
    assert 0 <= float(whole.min()) < float(whole.max()) <= 1
    for batch_size in (1, 2):
        drawn = generate(model, prompts_of(model), steps=2, seed=4, batch_size=batch_size)
        # Batches round differently; noise that depended on them would differ by the whole image.
        torch.testing.assert_close(drawn, whole, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_large_samples_are_drawn_in_small_batches_and_decoded_in_smaller_ones(models, monkeypatch):
    assert [at_once((4, size, size)) for size in (8, 32, 64, 128, 512)] == [64, 64, 16, 4, 1]
    assert [at_once((4, size, size), cost=4) for size in (8, 32, 64, 128)] == [64, 16, 4, 1]
    assert at_once((4, 8, 8), 32) == 32
    model, passes, decoded = models["tiny_sd"], Passes(models["tiny_sd"], monkeypatch), []
    decode = Model.decode
    monkeypatch.setattr(Model, "decode", lambda model, x0: decoded.append(len(x0)) or decode(model, x0))
    # The tiny checkpoint's latents are 8x8, and 64x64 are as large as Stable Diffusion 1.5's.
    generate(model, [""] * 20, steps=1, guidance_scale=1, height=128, width=128)
    assert passes.batches == [16, 4] and decoded == [4] * 5
    generate(model, [""] * 3, steps=1, guidance_scale=1, height=128, width=128, batch_size=2)
    assert passes.batches[2:] == [2, 1] and decoded[5:] == [2, 1]


def test_noise_is_keyed_by_seed_and_place():
    first = initial_noise((2, 3), 0, range(4))
    assert torch.equal(initial_noise((2, 3), 0, [2])[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(initial_noise((2, 3), 1, range(4)), first)
    # (1, 23) and (12, 3) are different keys.
    assert not torch.equal(initial_noise((2,), 1, [23]), initial_noise((2,), 12, [3]))


def test_initial_noise_of_ones_own_takes_the_place_of_the_seeds(models):
    model = models["tiny_sd"]
    z = initial_noise(model.latent_shape, 5, range(3))
    found = generate_latents(model, PROMPTS[:3], z=z, steps=2, batch_size=2)
    assert torch.equal(found, generate_latents(model, PROMPTS[:3], seed=5, steps=2, batch_size=2))
    fresh = [generate_latents(model, PROMPTS[:3], z=z, seed=s, steps=2, sampler="ancestral") for s in (0, 1)]
    assert not torch.equal(*fresh)


def test_noise_leaves_the_global_random_state_alone(models):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    generate(models["tiny_sd"], ["a cat"], steps=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd_v", "tiny_sdxl", "tiny_sdxl_v"])
def test_ddim_agrees_with_the_stock_pipeline(request, name, scale):
    model = open_model(request.getfixturevalue(name))
    ours = generate(model, PROMPTS, steps=4, guidance_scale=scale, seed=9)
    pipeline = model.pipeline
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    generators = [image_generator(9, i) for i in range(len(PROMPTS))]
    stock = pipeline(PROMPTS, num_inference_steps=4, guidance_scale=scale, generator=generators, output_type="pt")
    torch.testing.assert_close(ours, stock.images, atol=2e-5, rtol=0)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("negative", [None, "a dog"])
def test_flow_agrees_with_the_stock_pipeline(tiny_sd3, negative):
    model = open_model(tiny_sd3)
    ours = generate(model, PROMPTS, steps=4, seed=9, negative_prompt=negative)
    model.pipeline.set_progress_bar_config(disable=True)
    stock = model.pipeline(
        PROMPTS,
        negative_prompt=[negative or ""] * len(PROMPTS),
        num_inference_steps=4,
        guidance_scale=7.0,
        generator=[image_generator(9, i) for i in range(len(PROMPTS))],
        output_type="pt",
    )
    torch.testing.assert_close(ours, stock.images, atol=2e-5, rtol=0)


def test_guidance_of_one_is_a_single_pass(models, monkeypatch):
    passes = Passes(models["tiny_sd"], monkeypatch)
    generate(models["tiny_sd"], ["a cat"], steps=3, guidance_scale=1)
    assert passes.batches == [1, 1, 1]
    generate(models["tiny_sd"], ["a cat"], steps=1, guidance_scale=2)
    assert passes.batches[3:] == [2]


def test_guidance_interpolates_between_null_and_prompt(models):
    model = models["tiny_sd_v"]
    z = {"steps": 1, "seed": 2}
    null = generate_latents(model, [""], guidance_scale=1, **z)
    prompt = generate_latents(model, ["a cat"], guidance_scale=1, **z)
    guided = generate_latents(model, ["a cat"], guidance_scale=3, **z)
    torch.testing.assert_close(guided, null + 3 * (prompt - null), atol=1e-5, rtol=1e-5)


def test_a_negative_prompt_takes_the_place_of_no_text(models):
    model = models["tiny_sd_v"]
    options = {"steps": 1, "seed": 2, "guidance_scale": 3}
    plain = generate_latents(model, ["a cat"], **options)
    assert torch.equal(generate_latents(model, ["a cat"], negative_prompt="", **options), plain)
    assert not torch.equal(generate_latents(model, ["a cat"], negative_prompt="a dog", **options), plain)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "trajectory"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_sampler_takes_one_step_to_x0(models, name, sampler):
    model = models[name]
    prompts = prompts_of(model)
    expected = generate(model, prompts, steps=1, guidance_scale=1, sampler="one_step")
    drawn = generate(model, prompts, steps=1, guidance_scale=1, sampler=sampler)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)


def test_a_student_may_start_before_the_end(models):
    model = models["tiny_edm"]
    drawn = generate_latents(model, 2, steps=1, start=2.5, seed=1)
    z = initial_noise(model.latent_shape, 1, range(2))
    with torch.no_grad():
        torch.testing.assert_close(drawn, model.denoiser(2.5 * z, 2.5).x0, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="takes 1 step, not 2"):
        generate_latents(model, 2, steps=2, start=2.5)


def test_latents_are_what_images_are_decoded_from(models):
    model = models["tiny_sd"]
    latents = generate_latents(model, ["a cat", "a dog"], steps=2)
    images = generate(model, ["a cat", "a dog"], steps=2)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(latents).clamp(0, 1), images, atol=1e-6, rtol=0)


def test_other_image_sizes(models):
    assert generate(models["tiny_sd"], ["a cat"], steps=1, height=24, width=32).shape == (1, 3, 24, 32)


@pytest.mark.slow
def test_the_checkpoints_defaults_are_used(tiny_sd, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "own"))
    (folder / "sublimate.json").write_text(json.dumps({"guidance_scale": 1.0, "steps": 2, "start": 400.0}))
    model = open_model(folder)
    with pytest.raises(ValueError, match="takes 1 step, not 2"):
        generate(model, ["a cat"])
    passes = Passes(model, monkeypatch)
    drawn = generate(model, ["a cat"], steps=1)
    assert passes.batches == [1]
    expected = generate(open_model(tiny_sd), ["a cat"], steps=1, guidance_scale=1, start=400)
    torch.testing.assert_close(drawn, expected, atol=1e-6, rtol=0)
    passes.batches.clear()
    generate(open_model(tiny_sd), ["a cat"])
    assert passes.batches == [2] * 25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least 1 step, not 0"),
        ({"steps": 1001}, "1000"),
        ({"guidance_scale": -1}, r"guidance scale cannot be -1\.0"),
        ({"guidance_scale": 0}, r"cannot be 0\.0: 1 is no guidance here, where stock pipelines also write 0"),
        ({"guidance_scale": 0.5}, r"guidance scale cannot be 0\.5"),
        ({"guidance_scale": float("nan")}, "guidance scale cannot be nan"),
        ({"guidance_scale": 1, "negative_prompt": "a dog"}, "negative prompt needs guidance"),
        ({"sampler": "magic"}, "no sampler 'magic'; use one of ddim, euler, heun, ancestral, one_step"),
        ({"sampler": "trajectory"}, "target_time"),
        ({"sampler": "one_step", "steps": 2}, "takes 1 step, not 2"),
        ({"batch_size": 0}, "nothing to draw"),
        ({"height": 7}, "multiple of 2 pixels"),
    ],
)
def test_options_that_do_not_fit_are_refused(models, options, message):
    with pytest.raises(ValueError, match=message):
        generate(models["tiny_sd"], ["a cat"], **options)


def test_options_are_those_that_sampling_is_chosen_by(models):
    chosen = signature(choose_sampling).parameters.keys() - {"model"}
    assert SamplingOptions.__annotations__.keys() == chosen
    assert all(name in SamplingOptions.__doc__ for name in chosen)
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        generate(models["tiny_sd"], ["a cat"], step=1)


def test_prompts_that_do_not_fit_are_refused(models):
    with pytest.raises(TypeError, match="list of prompts"):
        generate(models["tiny_sd"], "a cat")
    with pytest.raises(ValueError, match="nothing to draw"):
        generate(models["tiny_sd"], [])
    with pytest.raises(ValueError, match="no text to guide by"):
        generate(models["tiny_unconditional"], 1, guidance_scale=2)


@pytest.mark.parametrize("negative", [["a dog"], ["a dog", "a cat"], 3])
def test_one_negative_prompt_serves_all(models, negative):
    with pytest.raises(TypeError, match="Give one negative prompt, a text"):
        generate(models["tiny_sd"], ["a cat"], steps=1, guidance_scale=2, negative_prompt=negative)


@pytest.mark.slow
def test_prompts_that_are_too_long_are_cut_where_that_is_asked_for(models, caplog):
    model, options = models["tiny_sd"], {"steps": 1, "guidance_scale": 2}
    long, beginning = "cat " * 40, "cat " * (model.pipeline.tokenizer.model_max_length - 2)
    prompts, told = [long, "a dog", long + "red", long], {"negative_prompt": long + "a dog"}
    with pytest.raises(ValueError, match="shorten it"):
        generate_latents(model, prompts, **options)
    with pytest.raises(ValueError, match="shorten it"):
        generate_latents(model, ["a cat"], **told, **options)
    found = generate_latents(model, prompts, **told, truncate_prompts=True, batch_size=2, **options)
    assert caplog.messages == ["3 of the prompts were longer than the text encoder reads and cut to fit."]
    short = [beginning, "a dog", beginning, beginning]
    expected = generate_latents(model, short, negative_prompt=beginning, batch_size=2, **options)
    torch.testing.assert_close(found, expected)
    caplog.clear()
    generate(model, ["a cat"], truncate_prompts=True, **options)
    assert not caplog.messages
    generate(model, [long], truncate_prompts=True, **options)
    assert caplog.messages == ["1 of the prompts was longer than the text encoder reads and cut to fit."]


def test_progress_counts_passes(models, capsys):
    generate(models["tiny_unconditional"], 3, steps=2, sampler="heun", batch_size=2, progress=True)
    assert "9/9" in capsys.readouterr().err
