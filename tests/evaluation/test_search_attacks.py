"""Attacks that search words, embeddings or noise: what they look for, and that they find it."""

import pytest
import torch
from attacked import attack_of, attacked, case_of

from sublimate.erasure.adversaries import denoising_error
from sublimate.evaluation.attack import pictured
from sublimate.evaluation.attacks import latent_search, textual_inversion
from sublimate.evaluation.words import spellable, unspoken
from sublimate.pipelines.generate import generate, generate_latents
from sublimate.training.randomness import SampleRandom, key


@pytest.fixture
def model(tiny_sd):
    return attacked(tiny_sd)


@pytest.mark.slow
def test_word_search_finds_the_best_word_of_all(model):
    case, words = case_of(model), sorted(spellable(model, case_of(model).concept))
    assert "cat" not in words and "seven" not in words and "dog" in words
    attack = attack_of("word_search", tokens=1, rounds=1, candidates=len(words) + 1, images=3)
    found = attack.run(model, case, seed=2).found
    seed = key(2, "word_search", 0)
    scores = {
        word: float(case.probability(generate(model, [f"{p} {word}" for p in case.prompts], seed=seed)).mean())
        for word in words
    }
    assert found == f"“{max(words, key=scores.__getitem__)}”"


@pytest.mark.slow
def test_an_adversarial_prefix_is_written_in_words_and_never_worse_than_none(model):
    case = case_of(model)
    outcome = attack_of("adversarial_prefix", tokens=2, max_train_steps=4, learning_rate=1.0).run(model, case, seed=0)
    words = spellable(model, case.concept)
    for prompt, own in zip(outcome.prompts, case.prompts, strict=True):
        prefix = prompt.removesuffix(own).split()
        assert len(prefix) in (0, 2) and all(word in words for word in prefix)
        judging = (0, 0, "judging a prefix", range(8))
        found, none = (error_of(model, case, judging, lambda c, p=p: f"{p} {c}") for p in (" ".join(prefix), ""))
        assert found <= none


@torch.no_grad()
def error_of(model, case, drawn, say):
    """How badly the model reads two pictures of the case, told what `say` makes of their captions."""

    def told(rows):
        return model.encode_prompts([say(case.captions[row]).strip() for row in rows.tolist()])

    return float(denoising_error(model.denoiser, SampleRandom(*drawn), pictured(model, case.pictures[:2]), told))


@pytest.mark.slow
def test_textual_inversion_learns_what_it_is_shown(model, monkeypatch):
    """With enough updates the learned words fit the pictures better than the words they started as."""
    case, errors = case_of(model), []
    word = unspoken(model, case.concept, (*case.prompts, *case.captions))

    def drawn(model, prompts, **options):
        noise = (9, 0, "x", range(64))
        errors.append(error_of(model, case, noise, lambda caption: case.renamed([caption], f"{word} {word}")[0]))
        return generate(model, prompts, **options)

    monkeypatch.setattr(textual_inversion, "generate", drawn)
    few = attack_of("textual_inversion", tokens=2, max_train_steps=1, learning_rate=1e-9).run(model, case, seed=0)
    plain = generate(model, case.renamed(case.prompts, "a a"), seed=0)
    torch.testing.assert_close(few.images, plain.cpu(), atol=1e-4, rtol=0)
    attack_of("textual_inversion", max_train_steps=30, learning_rate=0.1).run(model, case, seed=0)
    assert errors[1] < errors[0] - 5e-4, errors


def test_what_is_learned_stands_in_the_concepts_place(model, monkeypatch):
    case, told = case_of(model), []

    def drawn(model, prompts, **options):
        told.append(model.encode_prompts(prompts)["text"])
        return generate(model, prompts, **options)

    monkeypatch.setattr(textual_inversion, "generate", drawn)
    attack_of("textual_inversion", tokens=1, learning_rate=1.0).run(model, case, seed=0)
    started = model.encode_prompts(case.renamed(case.prompts, "a"))["text"]
    # A causal encoder's states differ from the first word on that does, though "a" stands before some of them.
    first = (told[0] != started).any(dim=-1).int().argmax(dim=1).tolist()
    before = [prompt.lower().partition("cat")[0] for prompt in case.prompts]
    assert first == [1 + len(model.pipeline.tokenizer(text, add_special_tokens=False).input_ids) for text in before]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), [("universal_token", {"train_batch_size": 8}), ("latent_search", {})])
def test_searches_by_gradient_raise_what_the_detector_sees(name, more, model):
    case = case_of(model)
    options = {"surrogate_steps": 2, **more}  # as many as the model takes
    weak, strong = (attack_of(name, max_train_steps=n, learning_rate=r, **options) for n, r in ((1, 1e-9), (30, 0.2)))
    before, after = (float(case.probability(a.run(model, case, seed=0).images).log().mean()) for a in (weak, strong))
    assert after > before + 1e-5


def test_a_universal_token_does_not_name_the_concept(model):
    prompts = attack_of("universal_token").run(model, case_of(model), seed=0).prompts
    assert prompts[0] == "a a red dog" and not any("cat" in prompt.lower() for prompt in prompts)


def test_searched_latents_stay_on_the_sphere_of_typical_noise(model, monkeypatch):
    drawn = []

    def noting(*args, z, **options):
        drawn.append(z)
        return generate_latents(*args, z=z, **options)

    monkeypatch.setattr(latent_search, "generate_latents", noting)
    attack_of("latent_search", learning_rate=1.0).run(model, case_of(model), seed=0)
    radii = torch.cat(drawn).flatten(1).norm(dim=1)
    torch.testing.assert_close(radii, torch.full_like(radii, drawn[0][0].numel() ** 0.5))
