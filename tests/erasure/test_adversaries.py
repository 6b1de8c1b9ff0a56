"""Searched words: what stands in a prompt is what encoders read, and only within the context."""

import pytest
import torch

from sublimate.diffusion.predictions import add_noise
from sublimate.erasure.adversaries import SoftWords, denoising_error, minimise
from sublimate.pipelines.model import open_model
from sublimate.training.losses import denoising_loss
from sublimate.training.randomness import SampleRandom

PROMPTS = ["a red cat", "the dog in the style of van gogh", "cat red cat", "a photo"]
FAMILIES = ("tiny_sd", pytest.param("tiny_sd3", marks=pytest.mark.slow))


@pytest.fixture(params=FAMILIES)
def model(request):
    return open_model(request.getfixturevalue(request.param))


def disturbed(soft, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in soft.values.values():
            # Not by a constant, which layer norms take out again.
            value.add_(torch.randn(value.shape, generator=generator))
    return soft


def test_they_start_as_the_words_and_change_no_other_prompt(model):
    plain = model.encode_prompts(PROMPTS)
    with SoftWords(model, "red cat").spoken():
        for key, value in model.encode_prompts(PROMPTS).items():
            torch.testing.assert_close(value, plain[key])
    with disturbed(SoftWords(model, "red cat")).spoken():
        moved = model.encode_prompts(PROMPTS)
    for key, value in moved.items():
        changed = (value != plain[key]).flatten(1).any(dim=1)
        assert changed.tolist() == [True, False, True, False]
    assert all(torch.equal(value, plain[key]) for key, value in model.encode_prompts(PROMPTS).items())


def test_they_start_where_they_are_told_to(model):
    plain = model.encode_prompts(["a red dog dog", "a dog in red"])
    with SoftWords(model, "seven cat", start="dog").spoken():
        for key, value in model.encode_prompts(["a red seven cat", "a dog in red"]).items():
            torch.testing.assert_close(value, plain[key])


def test_they_equal_a_table_with_other_rows(model):
    soft = disturbed(SoftWords(model, "dog"))
    with soft.spoken():
        placed = model.encode_prompts(["the dog"])
    for name, table in soft.tables().items():
        tokenizer = getattr(model.pipeline, name.replace("text_encoder", "tokenizer"))
        with torch.no_grad():
            table[tokenizer("dog", add_special_tokens=False).input_ids] = soft.values[name]
    for key, value in model.encode_prompts(["the dog"]).items():
        torch.testing.assert_close(value, placed[key])


def test_gradients_reach_them_and_nothing_else(model):
    soft = SoftWords(model, "cat")
    with soft.spoken():
        sum(value.square().sum() for value in model.encode_prompts(["cat red cat"]).values()).backward()
    assert all(value.grad.abs().sum() > 0 for value in soft.values.values())
    assert all(p.grad is None for p in model.parameters().values())


def test_only_the_first_mention_counts(tiny_sd):
    model = open_model(tiny_sd)
    plain = model.encode_prompts(["cat red cat"])["text"]
    with disturbed(SoftWords(model, "cat")).spoken():
        once = model.encode_prompts(["cat red dog"])["text"][:, 1]
        torch.testing.assert_close(model.encode_prompts(["cat red cat"])["text"][:, 1], once)
    assert not torch.equal(once, plain[:, 1])


def test_prompts_may_have_vectors_of_their_own(tiny_sd):
    model = open_model(tiny_sd)
    soft, prompts = SoftWords(model, "cat"), ["a dog", "the cat", "a cat in red"]
    each = [disturbed(SoftWords(model, "cat"), seed).values["text_encoder"].detach() for seed in range(3)]
    soft.values["text_encoder"] = torch.stack(each)
    with soft.spoken():
        together = model.encode_prompts(prompts)["text"]
    for i, prompt in enumerate(prompts):
        soft.values["text_encoder"] = each[i]
        with soft.spoken():
            torch.testing.assert_close(model.encode_prompts([prompt])["text"][0], together[i])


def test_words_without_tokens_and_models_without_prompts_are_refused(tiny_sd, tiny_unconditional):
    with pytest.raises(ValueError, match="at least one word"):
        SoftWords(open_model(tiny_sd), " ")
    with pytest.raises(ValueError, match="has no text encoder"):
        SoftWords(open_model(tiny_unconditional), "cat")


def test_the_denoising_error_is_that_of_pictures_with_their_conditions(tiny_sd):
    model = open_model(tiny_sd)
    latents, told = torch.randn(3, *model.latent_shape), model.encode_prompts(PROMPTS[:3])
    error = denoising_error(model.denoiser, SampleRandom(0, 0, "a", range(5)), latents, told.index)
    again = SampleRandom(0, 0, "a", range(5))
    rows, eps, u = again.integers(3), again.normal(model.latent_shape), again.uniform()
    t = model.schedule.uniform_time(u)
    prediction = model.denoiser(add_noise(model.schedule, latents[rows], eps, t), t, told.index(rows))
    torch.testing.assert_close(error, denoising_loss(prediction, latents[rows], eps).mean())


def quadratic(x):
    return lambda random: (x - random.normal((3,))).square().mean()


def test_a_search_descends_and_goes_on_where_it_stopped():
    whole, parts = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    options = {"learning_rate": 0.1, "batch_size": 4, "seed": 1, "name": "search"}
    minimise(lambda random: (whole - 2).square().sum(), [whole], steps=200, **options)
    assert (whole - 2).abs().max() < 0.05
    whole.data.zero_()
    minimise(quadratic(whole), [whole], steps=6, **options)
    optimizer = minimise(quadratic(parts), [parts], steps=2, **options)
    minimise(quadratic(parts), [parts], steps=4, start=2, optimizer=optimizer, **options)
    assert torch.equal(whole, parts)
