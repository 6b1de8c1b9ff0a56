"""DITTO-2 on a linear model, whose optimum is known, and on Ink."""

import pytest
import torch

from sublimate.diffusion.predictions import Parametrization, Prediction
from sublimate.pipelines.controls import colour, keep
from sublimate.pipelines.ditto import ditto, surrogate
from sublimate.pipelines.generate import generate, generate_latents
from sublimate.pipelines.model import open_model


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


def test_the_optimum_is_the_least_squares_solution(linear):
    model, matrix = linear
    target = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"iterations": 400, "learning_rate": 0.05, "steps": 1}
    found = ditto(model, 2, keep(target, torch.ones(8, 8)), **options)
    exact = torch.linalg.solve(matrix, (2 * target - 1).flatten())
    assert (found.z.flatten(1) - exact).abs().max() < 0.02
    assert bool((found.losses[-1] < 1e-4 * found.losses[0]).all())
    torch.testing.assert_close(found.surrogate_images[0], target, atol=0.01, rtol=0)


def test_pixels_that_may_change_keep_their_noise(linear):
    model = with_x0(linear[0], lambda x_t: x_t)
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    found = ditto(model, 1, keep(torch.zeros(3, 8, 8), mask), iterations=5, steps=1)
    start = ditto(model, 1, keep(torch.zeros(3, 8, 8), mask), iterations=0, steps=1)
    assert torch.equal(found.z[..., 4:], start.z[..., 4:])
    assert not torch.equal(found.z[..., :4], start.z[..., :4])


def test_without_iterations_it_draws_what_generate_draws(tiny_sd_v):
    model = open_model(tiny_sd_v)
    found = ditto(model, ["a dog", "red cat"], lambda media: media.flatten(1).mean(1), iterations=0, steps=3, seed=4)
    assert torch.equal(found.images, generate(model, ["a dog", "red cat"], steps=3, seed=4))
    one = generate(model, ["a dog", "red cat"], sampler="one_step", guidance_scale=1.0, seed=4)
    torch.testing.assert_close(found.surrogate_images, one)


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


def test_a_decoder_of_its_own_draws_from_the_noise_found(tiny_sd, tiny_sd_v):
    student, decoder = open_model(tiny_sd_v), open_model(tiny_sd)
    found = ditto(student, ["a dog"], lambda m: m.flatten(1).mean(1), decoder=decoder, iterations=2, steps=2)
    latents = generate_latents(decoder, ["a dog"], z=found.z, steps=2)
    assert torch.equal(found.images, decoder.decode(latents).clamp(0, 1))


def test_misuse_is_named(tiny_sd, tiny_unconditional):
    model = open_model(tiny_sd)
    with pytest.raises(ValueError, match="must share one latent space"):
        ditto(model, ["a dog"], lambda m: m, decoder=open_model(tiny_unconditional))
    with pytest.raises(ValueError, match="positive step, not 3, 0"):
        ditto(model, ["a dog"], lambda m: m, iterations=3, learning_rate=0)
    with pytest.raises(ValueError, match="2 samples need as many initial noises, not 1"):
        generate_latents(model, ["a dog", "red cat"], z=torch.zeros(1, 4, 8, 8))


@pytest.mark.slow
def test_ink_takes_the_colour_it_is_steered_to():
    """A bare prompt leaves the ink open; what the single step is steered to, eight steps draw."""
    model, red = open_model("ink"), colour((0.35, 0.02, 0.02))
    found = ditto(model, ["seven"] * 4, red, iterations=25, learning_rate=0.1, steps=8, seed=3)
    assert float(found.losses[-1].mean()) < 0.2 * float(found.losses[0].mean())
    before = generate(model, ["seven"] * 4, steps=8, seed=3)
    assert float(red(found.images).mean()) < 0.95 * float(red(before).mean())
    assert surrogate(model, found.z, ["seven"] * 4).shape == (4, 3, 32, 32)
