"""DITTO-2 on a linear model, whose optimum is known, and on Ink."""

import pytest
import torch

from sublimate.diffusion.predictions import Parametrization, Prediction
from sublimate.evaluation.detectors import open_detector
from sublimate.pipelines.controls import colour, intensity, keep, shows
from sublimate.pipelines.ditto import ditto, surrogate
from sublimate.pipelines.generate import generate, generate_latents
from sublimate.pipelines.model import Model, open_model
from sublimate.pipelines.sampling import initial_noise


def brightness(media):
    return media.flatten(1).mean(1)


@pytest.fixture
def linear(tiny_unconditional):
    """A model whose one-step x0 is A z: what is optimised is then a least-squares problem."""
    model = open_model(tiny_unconditional)
    size = 3 * 8 * 8
    matrix = torch.eye(size) + 0.1 * torch.randn(size, size, generator=torch.Generator().manual_seed(0)) / size**0.5

    return with_x0(model, lambda x_t: (x_t.flatten(1) @ matrix.T).view_as(x_t)), matrix


def with_x0(model, function):
    """The model with another x0 of x_t."""

    def forward(x_t, t, condition=None, *, features=()):
        return Prediction(x_t, function(x_t), model.schedule.at(t), Parametrization("sample"))

    model.denoiser.forward = forward
    return model


@pytest.mark.slow
def test_the_optimum_is_the_least_squares_solution(linear):
    model, matrix = linear
    target = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"iterations": 400, "learning_rate": 0.05, "steps": 1}
    found = ditto(model, 2, keep(target, torch.ones(8, 8)), **options)
    exact = torch.linalg.solve(matrix, (2 * target - 1).flatten())
    assert (found.z.flatten(1) - exact).abs().max() < 1e-4
    assert bool((found.losses[-1] < 1e-8 * found.losses[0]).all())
    torch.testing.assert_close(found.surrogate_images[0], target, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_one_step_draws_what_was_optimised_and_more_steps_leave_a_gap(tiny_sd_v):
    # |M_T(z*) - M_1(z*)| is the price of the surrogate: nothing for T = 1.
    model = open_model(tiny_sd_v)
    options = {"iterations": 2, "guidance_scale": 1.0}
    one = ditto(model, ["a dog"], brightness, steps=1, sampler="one_step", **options)
    more = ditto(model, ["a dog"], brightness, steps=3, **options)
    torch.testing.assert_close(one.images, one.surrogate_images, atol=1e-6, rtol=0)
    assert torch.equal(one.z, more.z) and torch.equal(one.surrogate_images, more.surrogate_images)
    assert not torch.allclose(more.images, more.surrogate_images, atol=1e-3)


def test_pixels_that_may_change_keep_their_noise(linear):
    model = with_x0(linear[0], lambda x_t: x_t)
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    found = ditto(model, 1, keep(torch.zeros(3, 8, 8), mask), iterations=5, steps=1)
    start = ditto(model, 1, keep(torch.zeros(3, 8, 8), mask), iterations=0, steps=1)
    assert torch.equal(found.z[..., 4:], start.z[..., 4:])
    assert not torch.equal(found.z[..., :4], start.z[..., :4])


@pytest.mark.slow
def test_without_iterations_it_draws_what_generate_draws(tiny_sd_v):
    model = open_model(tiny_sd_v)
    found = ditto(model, ["a dog", "red cat"], lambda media: media.flatten(1).mean(1), iterations=0, steps=3, seed=4)
    assert torch.equal(found.images, generate(model, ["a dog", "red cat"], steps=3, seed=4))
    one = generate(model, ["a dog", "red cat"], sampler="one_step", guidance_scale=1.0, seed=4)
    torch.testing.assert_close(found.surrogate_images, one)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["consistency", "target_driven", "euler"])
def test_a_samplers_fresh_noise_is_none_of_the_initial_noise(tiny_sd_v, sampler):
    model, prompts = open_model(tiny_sd_v), ["a dog", "red cat"]
    sampling = {"sampler": sampler, "steps": 3, "seed": 4, **({"eta": 0.7} if sampler == "target_driven" else {})}
    found = ditto(model, prompts, brightness, iterations=0, **sampling)
    assert torch.equal(found.images, generate(model, prompts, **sampling))
    z = initial_noise(model.latent_shape, 4, range(2))
    assert torch.equal(generate_latents(model, prompts, z=z, **sampling), generate_latents(model, prompts, **sampling))


@pytest.mark.slow
def test_a_student_that_is_told_the_scale_is_told_its_own(tiny_sd):
    opened = open_model(tiny_sd)
    unet = opened.denoiser_with_number_input().network
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, generator=torch.Generator().manual_seed(7))
    opened.pipeline.unet = unet
    model = Model(opened.pipeline, "told", {"guidance_scale": 6.0, "steps": 1})
    one = {"steps": 1, "sampler": "one_step"}
    found = ditto(model, ["a dog"], brightness, iterations=0, **one)
    torch.testing.assert_close(found.surrogate_images, found.images, atol=1e-6, rtol=0)
    other = ditto(model, ["a dog"], brightness, iterations=0, guidance_scale=2.0, **one)
    torch.testing.assert_close(other.surrogate_images, other.images, atol=1e-6, rtol=0)
    assert not torch.allclose(other.images, found.images, atol=1e-4)
    # A decoder's scale is none of the surrogate's.
    apart = ditto(model, ["a dog"], brightness, decoder=opened, iterations=0, guidance_scale=2.0, **one)
    torch.testing.assert_close(apart.surrogate_images, found.surrogate_images, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny_sd_v", "tiny_audio"])
def test_checkpointing_changes_memory_alone_and_is_undone(request, family):
    # The prompts differ in length, so that a mask of text matters.
    model, prompts = open_model(request.getfixturevalue(family)), ["a dog", "a red cat in the style of van gogh"]
    options = {"iterations": 2, "learning_rate": 0.1, "steps": 1}
    plain = ditto(model, prompts, brightness, **options)
    saved = ditto(model, prompts, brightness, gradient_checkpointing=True, **options)
    torch.testing.assert_close(saved.losses, plain.losses, atol=1e-6, rtol=1e-5)
    assert not any(model.component(name).is_gradient_checkpointing for name in ("unet", "vae"))


def test_checkpointing_is_refused_where_no_network_has_it(tiny_sd, monkeypatch):
    model = open_model(tiny_sd)
    for name in ("unet", "vae"):
        monkeypatch.setattr(type(model.component(name)), "_supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="has gradient checkpointing: leave that out"):
        ditto(model, ["a dog"], brightness, gradient_checkpointing=True, iterations=1, steps=1)


@pytest.mark.slow
def test_sound_follows_a_curve_of_intensity(tiny_audio):
    model, curve = open_model(tiny_audio), intensity(torch.linspace(-2.5, 1.5, 4))
    before = model.content_hash()
    options = {"learning_rate": 0.3, "steps": 1, "guidance_scale": 1.0}
    found = ditto(model, ["a dog", "a red cat"], curve, iterations=12, **options)
    assert found.images.shape == (2, 1, 16, 8) and float(found.images.min()) < 0
    assert bool((found.losses[-1] < 0.7 * found.losses[0]).all())
    alone = ditto(model, ["a dog", "a red cat"], curve, batch_size=1, iterations=2, **options)
    torch.testing.assert_close(alone.losses, found.losses[:3], atol=1e-4, rtol=1e-3)
    assert model.content_hash() == before
    longer = ditto(model, ["a dog"], curve, iterations=1, steps=1, height=32)
    assert longer.images.shape == (1, 1, 32, 8) and longer.z.shape == (1, 4, 16, 4)


@pytest.mark.slow
def test_samples_do_not_interact_and_weights_stay(tiny_sd_v):
    model = open_model(tiny_sd_v)
    before = model.content_hash()
    bright = lambda media: (1 - media).square().flatten(1).mean(1)  # noqa: E731
    options = {"iterations": 3, "learning_rate": 0.1, "steps": 2}
    together = ditto(model, ["a dog", "red cat"], bright, **options)
    apart = ditto(model, ["a dog", "red cat"], bright, batch_size=1, **options)
    torch.testing.assert_close(together.z, apart.z, rtol=0, atol=2e-3)
    assert together.losses.shape == (4, 2)
    assert bool((together.losses[-1] < together.losses[0]).all())
    assert model.content_hash() == before
    assert all(p.grad is None and not p.requires_grad for p in model.parameters().values())


@pytest.mark.slow
def test_a_decoder_of_its_own_draws_from_the_noise_found(tiny_sd, tiny_sd_v):
    student, decoder = open_model(tiny_sd_v), open_model(tiny_sd)
    found = ditto(student, ["a dog"], lambda m: m.flatten(1).mean(1), decoder=decoder, iterations=2, steps=2)
    latents = generate_latents(decoder, ["a dog"], z=found.z, steps=2)
    assert torch.equal(found.images, decoder.decode(latents).clamp(0, 1))


def test_misuse_is_named(tiny_sd, tiny_unconditional):
    model = open_model(tiny_sd)
    with pytest.raises(ValueError, match="must share one latent space"):
        ditto(model, ["a dog"], lambda m: m, decoder=open_model(tiny_unconditional))

    def control(media):
        raise AssertionError("no update is made before the decoder's options are known to do")

    for options, message in (
        ({"sampler": "nope"}, "no sampler 'nope'"),
        ({"steps": 0}, "at least 1 step"),
        ({"guidance_scale": -1}, "cannot be -1"),
    ):
        with pytest.raises(ValueError, match=message):
            ditto(model, ["a dog"], control, **options)
    with pytest.raises(TypeError, match="Give a list of prompts"):
        ditto(model, "a dog", control)
    with pytest.raises(ValueError, match="positive step, not 3, 0"):
        ditto(model, ["a dog"], lambda m: m, iterations=3, learning_rate=0)
    with pytest.raises(ValueError, match="2 samples need as many initial noises, not 1"):
        generate_latents(model, ["a dog", "red cat"], z=torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"noise of \(4, 8, 9\) does not fit latents of \(4, 8, 8\)"):
        generate_latents(model, ["a dog"], z=torch.zeros(1, 4, 8, 9))


@pytest.mark.slow
def test_inks_single_step_keeps_what_is_known_and_leans_to_what_a_detector_is_asked_for():
    # The teacher's single step is blurred, which the detector rejects: its score moves, but slowly.
    model = open_model("ink")
    known = generate(model, ["red seven"], steps=8, seed=3)[0]
    left = torch.cat([torch.ones(32, 16), torch.zeros(32, 16)], dim=1)
    options = {"iterations": 20, "learning_rate": 0.1, "steps": 1, "seed": 5}
    found = ditto(model, ["seven"] * 4, keep(known, left), **options)
    assert bool((found.losses[-1] < 0.25 * found.losses[0]).all())
    red = ditto(model, ["seven"] * 4, shows(open_detector("ink"), ink="red"), **options)
    assert float(red.losses[-1].mean()) < 0.9 * float(red.losses[0].mean())


@pytest.mark.slow
def test_ink_takes_the_colour_it_is_steered_to():
    """A bare prompt leaves the ink open; what the single step is steered to, eight steps draw."""
    model, red = open_model("ink"), colour((0.35, 0.02, 0.02))
    found = ditto(model, ["seven"] * 4, red, iterations=25, learning_rate=0.1, steps=8, seed=3)
    assert float(found.losses[-1].mean()) < 0.2 * float(found.losses[0].mean())
    before = generate(model, ["seven"] * 4, steps=8, seed=3)
    assert float(red(found.images).mean()) < 0.95 * float(red(before).mean())
    assert surrogate(model, found.z, ["seven"] * 4).shape == (4, 3, 32, 32)
