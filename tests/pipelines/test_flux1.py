"""FLUX.1: packed latents, a guidance scale that the network is told, a shift by size, against the stock pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.guidance import extrapolated, guided
from sublimate.pipelines.backbones.flux1 import packed, unpacked
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model, open_model
from sublimate.pipelines.sampling import image_generator, initial_noise

PROMPTS = ["a red cat", "a painting in the style of van gogh"]
FAMILIES = ("tiny_flux", "tiny_flux_schnell")


@pytest.fixture
def dev(tiny_flux) -> Model:
    return open_model(tiny_flux)


@pytest.fixture
def schnell(tiny_flux_schnell) -> Model:
    return open_model(tiny_flux_schnell)


def drawn_by_stock(model: Model, size: int = 16, seed: int = 4, **call) -> torch.Tensor:
    generators = [image_generator(seed, i) for i in range(len(PROMPTS))]
    model.pipeline.set_progress_bar_config(disable=True)
    return model.pipeline(
        PROMPTS, generator=generators, height=size, width=size, max_sequence_length=24, output_type="pt", **call
    ).images


def draws(model: Model, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    x_t = torch.randn((2, *model.latent_shape), generator=torch.Generator().manual_seed(seed))
    return x_t, torch.tensor([0.9, 0.3], dtype=torch.float64), model.encode_prompts(PROMPTS)


def test_packing_is_the_stock_pipelines():
    x = torch.randn(2, 4, 6, 8)
    tokens = packed(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(unpacked(tokens, 6, 8), x)
    assert torch.equal(unpacked(tokens, 6, 8), FluxPipeline._unpack_latents(tokens, 12, 16, 2))
    with pytest.raises(ValueError, match=r"even height and width, not \(6, 7\)"):
        packed(x[..., :7])


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_prediction_is_the_networks_velocity(request, name):
    model = open_model(request.getfixturevalue(name))
    x_t, t, condition = draws(model)
    x_t = x_t[..., :6]  # rows and columns must not be mixed up
    tokens, ids = model.pipeline.prepare_latents(2, 4, 16, 12, torch.float32, "cpu", None, packed(x_t))
    told = {"guidance": torch.ones(2)} if name == "tiny_flux" else {}
    velocity = model.pipeline.transformer(
        hidden_states=tokens,
        timestep=t.float(),
        encoder_hidden_states=condition["text"],
        pooled_projections=condition["text.pooled"],
        txt_ids=torch.zeros(24, 3),
        img_ids=ids,
        **told,
    ).sample
    velocity = model.pipeline._unpack_latents(velocity, 16, 12, 2)
    found = model.denoiser(x_t, t, condition)
    torch.testing.assert_close(found.output, velocity, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.x0, x_t - t.float().view(-1, 1, 1, 1) * velocity, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_half_precision_rounds_the_time_as_stock_does_and_autocast_does_not(tiny_flux, dev):
    half = open_model(tiny_flux, dtype=torch.bfloat16)
    x_t, t, condition = draws(half)
    velocity = half.pipeline.transformer(
        hidden_states=packed(x_t.bfloat16()),
        timestep=(1000 * t).bfloat16() / 1000,
        guidance=torch.full((2,), 3.3),
        encoder_hidden_states=condition["text"],
        pooled_projections=condition["text.pooled"],
        txt_ids=torch.zeros(24, 3),
        img_ids=half.pipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.bfloat16),
    ).sample
    found = half.denoiser(x_t.bfloat16(), t, condition.replace(guidance=torch.full((2,), 3.3))).output
    assert torch.equal(packed(found), velocity)
    x_t, _, condition = draws(dev)
    with torch.autocast("cpu", torch.bfloat16):
        near, end = (dev.denoiser(x_t, t, condition).output for t in (0.9985, 0.9995))  # 1 in bf16
    assert not torch.equal(near, end)


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_dev_draws_as_the_stock_pipeline(dev, scale):
    found = generate(dev, PROMPTS, steps=3, guidance_scale=scale, seed=4)
    expected = drawn_by_stock(dev, num_inference_steps=3, guidance_scale=scale)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_the_guidance_scale_is_a_default_of_its_family(dev, schnell):
    found = generate(dev, PROMPTS, steps=2, seed=4)
    torch.testing.assert_close(found, drawn_by_stock(dev, num_inference_steps=2), atol=2e-5, rtol=0)
    assert not torch.equal(found, generate(dev, PROMPTS, steps=2, seed=4, guidance_scale=1))
    assert (dev.guidance_scale, schnell.guidance_scale) == (3.5, 1.0)


def test_the_shift_depends_on_the_size_that_is_drawn(dev):
    assert dev.schedule_at((4, 16, 16)).shift > dev.schedule.shift
    found = generate(dev, PROMPTS, steps=3, seed=4, height=32, width=32)
    expected = drawn_by_stock(dev, 32, num_inference_steps=3)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_schnell_draws_in_four_steps_as_the_stock_pipeline(schnell):
    assert schnell.is_student
    found = generate(schnell, PROMPTS, seed=4)
    torch.testing.assert_close(found, drawn_by_stock(schnell, num_inference_steps=4), atol=2e-5, rtol=0)
    torch.testing.assert_close(found, generate(schnell, PROMPTS, seed=4, steps=4, sampler="euler"), atol=2e-5, rtol=0)


def test_schnell_is_guided_by_two_passes(schnell):
    found = generate(schnell, PROMPTS, seed=4, steps=2, guidance_scale=3)
    expected = drawn_by_stock(schnell, num_inference_steps=2, true_cfg_scale=3.0, negative_prompt=["", ""])
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


@torch.no_grad()
def test_guidance_of_a_told_network_is_one_pass(dev):
    x_t, t, condition = draws(dev)
    sizes = []
    handle = dev.denoiser.network.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    null = dev.null_condition()
    scales = torch.tensor([1.0, 5.0])
    each = guided(dev.denoiser, x_t, t, condition, null, scales).output
    assert sizes == [2]
    told = dev.denoiser(x_t, t, condition.replace(guidance=scales)).output
    assert torch.equal(each, told)
    # Where a condition says something else, guidance is what was asked for; 1 is what it is told otherwise.
    other = condition.replace(guidance=torch.full((2,), 9.0))
    assert torch.equal(guided(dev.denoiser, x_t, t, other, null, 1).output[0], told[0])
    assert torch.equal(dev.denoiser(x_t, t, condition).output[0], told[0])
    assert not torch.equal(dev.denoiser(x_t, t, condition).output[1], told[1])
    sizes.clear()
    extrapolated(dev.denoiser, x_t, t, condition, null, 2.0)
    assert sizes == [4]
    handle.remove()


@torch.no_grad()
def test_features_are_the_images_tokens(dev):
    x_t, t, condition = draws(dev)
    taps = dev.backbone.feature_taps(dev.denoiser.network)
    assert sorted(taps) == [
        f"{kind}.{i}" for kind in ("single_transformer_blocks", "transformer_blocks") for i in (0, 1)
    ]
    features = dev.denoiser(x_t, t, condition, features=taps).features
    assert {tuple(feature.shape) for feature in features.values()} == {(2, 16, 16)}


@torch.no_grad()
def test_prompts_are_as_long_as_t5_reads(dev):
    long = "a photo of the red dog in the style of a van gogh painting of a cat"
    text, pooled, _ = dev.pipeline.encode_prompt([long], device="cpu", max_sequence_length=24)
    ours = dev.encode_prompts([long])
    assert torch.equal(ours["text"], text) and torch.equal(ours["text.pooled"], pooled)


@torch.no_grad()
def test_one_number_is_told_at_a_time(dev, schnell):
    x_t, t, condition = draws(dev)
    s = torch.tensor([0.0, 0.5])
    jumping = dev.denoiser(x_t, t, condition.replace(target_time=s)).output
    assert torch.equal(jumping, dev.denoiser(x_t, t, condition.replace(guidance=1 + s)).output)
    assert torch.equal(jumping[0], dev.denoiser(x_t, t, condition).output[0])
    with pytest.raises(ValueError, match="guidance scale or a target time, not both"):
        dev.denoiser(x_t, t, condition.replace(target_time=s, guidance=s))
    with pytest.raises(ValueError, match=r"cannot use the condition's \['guidance'\]"):
        schnell.denoiser(x_t, t, condition.replace(guidance=s))
    assert dev.denoiser_with_number_input().network is dev.denoiser.network
    with pytest.raises(ValueError, match="cannot be told the guidance scale"):
        schnell.denoiser_with_number_input()


def test_a_negative_prompt_is_read_in_attention_and_beside_the_scale(dev):
    plain = generate(dev, PROMPTS, steps=1)
    steered = generate(dev, PROMPTS, steps=1, negative_prompt="gogh", negative_strength=0.5)
    assert not torch.equal(plain, steered)
    other = generate(dev, PROMPTS, steps=1, guidance_scale=1, negative_prompt="gogh", negative_strength=0.5)
    assert not torch.equal(steered, other)
    with pytest.raises(ValueError, match=r"told the guidance scale and has no other use .* give negative_strength"):
        generate(dev, PROMPTS, steps=1, negative_prompt="gogh")


def test_sizes(dev):
    assert dev.latent_shape == (4, 8, 8)
    assert dev.backbone.latent_shape(dev.pipeline, 24, 32) == (4, 12, 16)
    with pytest.raises(ValueError, match="multiple of 4 pixels, not 18"):
        dev.backbone.latent_shape(dev.pipeline, 18)


def test_what_the_stock_pipeline_cannot_do_is_refused(dev, schnell):
    for model, few in (
        (schnell, FewSteps("consistency", guidance_scale=2.0)),
        (dev, FewSteps("trajectory", guidance_scale=2.0)),
    ):
        with pytest.raises(ValueError, match="set guidance_scale to 1"):
            model.backbone.few_steps(model.pipeline, few)


def test_a_stock_pipeline_jumps_to_clean_data_where_it_cannot_say_where_to(dev):
    stock = dev.backbone.few_steps(dev.pipeline, FewSteps("trajectory", steps=2))
    assert stock.scheduler.config.stochastic_sampling and stock.call["guidance_scale"] == 1
    told = dev.backbone.few_steps(dev.pipeline, FewSteps("target_driven", steps=2, guidance_scale=3.0))
    assert not told.scheduler.config.stochastic_sampling and told.call["guidance_scale"] == 3


def test_noise_is_the_stock_pipelines(dev):
    assert torch.equal(
        initial_noise(dev.latent_shape, 4, [1])[0], torch.randn(1, 4, 8, 8, generator=image_generator(4, 1))[0]
    )
