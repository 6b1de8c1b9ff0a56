"""The audit: it says what it tried, on which models, and what not."""

from typing import ClassVar

import pytest
import torch
from attacked import attack_of, case_of
from memory import most_allocated

from sublimate.erasure.request import Concept
from sublimate.evaluation import audit as module
from sublimate.evaluation.audit import audit, make_attacks
from sublimate.evaluation.studies import ErasureStudy, PromptSet
from sublimate.pipelines.model import open_model


@pytest.fixture
def model(tiny_sd):
    opened = open_model(tiny_sd)
    opened.defaults |= {"steps": 2, "guidance_scale": 2.0}
    return opened


def study():
    animal = {"animal": "cat"}
    return ErasureStudy(
        concept="cat",
        group="animal",
        target=PromptSet(("a cat", "red cat"), (animal, animal)),
        synonyms=PromptSet(("a seven",), (animal,)),
        siblings=PromptSet(("a dog",), ({"animal": "dog"},)),
        unrelated=PromptSet(("a photo",), ({},)),
    )


class Constant:
    """Sees the concept everywhere, or nowhere."""

    groups: ClassVar = {"animal": ("cat", "dog")}

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, images):
        row = torch.tensor([0.9, 0.1, 0.0] if self.seen else [0.1, 0.9, 0.0])
        return {"animal": row.expand(len(images), 3)}


@pytest.mark.slow
def test_an_audit_says_what_it_tried_and_what_not(model, tiny_sd):
    edited = open_model(tiny_sd)
    edited.defaults |= model.defaults
    attacks = make_attacks(["paraphrases", "encoder_swap"])
    found = audit(model, edited, Concept("cat", "dog"), study(), Constant(True), attacks, pictures=2)
    assert [trial.name for trial in found.trials] == ["paraphrases"]
    assert found.skipped["encoder_swap"] == "the text encoders are the base's"
    assert found.skipped["relearning"] == "not asked for"
    (trial,) = found.trials
    assert trial.base.rate.value == trial.edited.rate.value == 1.0 and not trial.powerless
    assert trial.passes == 2 * 2 * 1  # two steps, guided, one paraphrase
    record = found.to_dict()
    assert record["attacks"][0]["edited"]["rate"]["value"] == 1.0 and record["not tried"] == found.skipped


@pytest.mark.slow
def test_an_attack_that_cannot_be_run_is_told_and_the_others_go_on(model):
    attacks = make_attacks(["textual_inversion", "seed_search"], {"textual_inversion": {"tokens": 1000}})
    found = audit(model, model, Concept("cat", "dog"), study(), Constant(True), attacks, pictures=2)
    assert [trial.name for trial in found.trials] == ["seed_search"]
    assert found.skipped["textual_inversion"].startswith("it could not be run: ")


@pytest.mark.slow
def test_an_attack_for_which_a_gpu_is_too_small_does_not_cost_the_audit(model, monkeypatch):
    def too_large(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 7 TiB.")

    attacks = make_attacks(["classifier_guidance", "seed_search"])
    monkeypatch.setattr(type(attacks[0]), "run", too_large)
    found = audit(model, model, Concept("cat", "dog"), study(), Constant(True), attacks, pictures=2)
    assert [trial.name for trial in found.trials] == ["seed_search"]
    assert found.skipped["classifier_guidance"] == "it could not be run: CUDA out of memory."


@pytest.mark.slow
def test_what_cannot_be_attacked_is_refused_before_anything_is_studied(model, tiny_sd, monkeypatch):
    def studied(*arguments):
        raise AssertionError("the study is the costly part")

    monkeypatch.setattr(module, "run_study", studied)
    half = open_model(tiny_sd, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="open both models in float32"):
        audit(model, half, Concept("cat"), study(), Constant(True), [], pictures=2)
    for name in ("unet", "vae"):
        monkeypatch.setattr(type(model.component(name)), "_supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="has gradient checkpointing: leave that out"):
        audit(model, model, Concept("cat"), study(), Constant(True), [], pictures=2, gradient_checkpointing=True)


@pytest.mark.slow
def test_checkpointing_changes_the_memory_of_attacks_alone_and_is_undone(model, monkeypatch):
    case = case_of(model)
    monkeypatch.setattr(module, "make_case", lambda *given, **options: case)
    attack = attack_of("latent_search", surrogate_steps=2, max_train_steps=1, learning_rate=0.2)

    def attacked_with(saving):
        found = []
        size = most_allocated(
            lambda: found.append(
                audit(model, model, case.concept, study(), case.detector, [attack], gradient_checkpointing=saving)
            )
        )
        return found[0].trials[0], size

    (plain, larger), (saved, smaller) = attacked_with(False), attacked_with(True)
    torch.testing.assert_close(saved.edited.images, plain.edited.images, atol=1, rtol=0)
    assert saved.edited.rate == plain.edited.rate and saved.base.rate == plain.base.rate
    assert saved.passes == plain.passes
    assert smaller < 0.8 * larger
    assert not any(model.component(name).is_gradient_checkpointing for name in ("unet", "vae"))


def test_what_the_base_does_not_draw_cannot_be_audited(model):
    with pytest.raises(ValueError, match="does not draw 'cat'"):
        audit(model, model, Concept("cat"), study(), Constant(False), [], pictures=2)
