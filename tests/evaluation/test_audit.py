"""The audit: it says what it tried, on which models, and what not."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from attacked import attack_of, case_of
from memory import most_allocated

from sublimate.erasure.request import Concept
from sublimate.evaluation import audit as module
from sublimate.evaluation import audit_parts
from sublimate.evaluation.attack import counting
from sublimate.evaluation.audit import audit, make_attacks
from sublimate.evaluation.studies import ErasureStudy, PromptSet
from sublimate.pipelines.model import open_model
from sublimate.training.trainer import Interrupted


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


class Noticing(Constant):
    """Sees the concept everywhere, and has features."""

    def __init__(self):
        super().__init__(True)

    def features(self, images):
        return images.flatten(2).mean(dim=2)


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
    assert trial.base.rate.value == trial.edited.rate.value == 1.0 and trial.brings_back
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
@pytest.mark.parametrize("method", ["run", "out_of_place"])
def test_an_attack_that_fails_unexpectedly_does_not_cost_the_audit(model, monkeypatch, caplog, method):
    def broken(*arguments, **options):
        raise RuntimeError("shapes do not fit\nmat1 and mat2")

    attacks = make_attacks(["encoder_swap", "seed_search"], {"seed_search": {"seeds": 1}})
    monkeypatch.setattr(type(attacks[0]), method, broken)
    found = audit(model, model, Concept("cat", "dog"), study(), Constant(True), attacks, pictures=2)
    assert [trial.name for trial in found.trials] == ["seed_search"]
    assert found.skipped["encoder_swap"] == "it could not be run: RuntimeError: shapes do not fit"
    assert "The attack encoder_swap failed." in caplog.text and "mat1 and mat2" in caplog.text


class Stopped(KeyboardInterrupt):
    """Somebody stops the audit."""


def test_a_training_that_is_told_to_stop_ends_the_audit(model, monkeypatch):
    def stop(*arguments, **options):
        raise Interrupted(15, Path("checkpoint-1"))

    attacks = make_attacks(["encoder_swap"])
    monkeypatch.setattr(type(attacks[0]), "run", stop)
    with pytest.raises(KeyboardInterrupt):
        audit(model, model, Concept("cat", "dog"), study(), Constant(True), attacks, pictures=2)


def test_a_distillation_that_reads_other_files_is_another_attack(tmp_path):
    config, prompts = tmp_path / "run.yaml", tmp_path / "prompts.txt"
    found = []
    for rate, text in ((1e-4, "a cat"), (1e-3, "a cat"), (1e-3, "a dog")):
        config.write_text(f"method: f_distill\nobjective: {{student: {{learning_rate: {rate}}}}}\n")
        prompts.write_text(text)
        options = {"config": str(config), "overrides": [f"data.prompts={prompts}"]}
        (attack,) = make_attacks(["distillation"], {"distillation": options})
        found.append(audit_parts._options(attack))
        assert audit_parts._options(attack) == found[-1]
    assert found[0] != found[1] != found[2]


@pytest.mark.slow
def test_an_audit_that_was_stopped_goes_on_where_it_was(model, monkeypatch, tmp_path):
    attacks = make_attacks(["seed_search", "completion"], {"seed_search": {"seeds": 1}})
    drawn, asked = [], study()

    def stop(*arguments, **options):
        raise Stopped

    def audited(folder=tmp_path, **changes):
        """An audit, and how many networks passes of it were made in this process."""
        given = {"concept": Concept("cat", "dog"), "study": asked, "detector": Noticing(), "attacks": attacks}
        given |= {"pictures": 2, "seed": 0, **changes}
        with counting(model) as passes:
            drawn.append(audit(model, model, folder=folder, **given))
        return passes.count

    with monkeypatch.context() as patched:
        patched.setattr(type(attacks[1]), "run", stop)
        with pytest.raises(Stopped):
            audited()
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["seed_search", "study"]
    rest, nothing, everything = audited(), audited(), audited(folder=None)
    assert nothing < rest < everything
    resumed, read, whole = drawn
    for found in (resumed, read):
        plain = found.to_dict(), whole.to_dict()
        for record in plain:
            for attack in record["attacks"]:
                del attack["seconds"]
        assert plain[0] == plain[1]
        for one, other in zip(found.trials, whole.trials, strict=True):
            assert one.edited.prompts == other.edited.prompts and torch.equal(one.edited.images, other.edited.images)
        for one, other in zip(found.erasure.examples, whole.erasure.examples, strict=True):
            assert (one.role, one.prompt, one.seed) == (other.role, other.prompt, other.seed)
            torch.testing.assert_close(one.after, other.after, atol=0.5 / 255 + 1e-6, rtol=0)


@pytest.mark.slow
def test_parts_of_another_audit_are_not_taken(model, tmp_path):
    def added(**changes):
        """How many parts an audit adds."""
        given = {"concept": Concept("cat", "dog"), "study": study(), "detector": Constant(True), "attacks": []}
        before = len(list(tmp_path.iterdir()))
        audit(model, model, folder=tmp_path, **{**given, "pictures": 2, **changes})
        return len(list(tmp_path.iterdir())) - before

    assert (added(), added()) == (1, 0)
    others = ({"seed": 1}, {"pictures": 3}, {"concept": Concept("cat", "red")}, {"detector": Noticing()})
    assert [added(**changes) for changes in others] == [1] * 4
    assert added(study=replace(study(), synonyms=PromptSet())) == 1
    searches = [make_attacks(["seed_search"], {"seed_search": {"seeds": seeds}}) for seeds in (1, 2)]
    assert [added(attacks=attacks) for attacks in (*searches, *searches)] == [1, 1, 0, 0]
    model.defaults["guidance_scale"] = 3.0
    assert added() == 1
    with torch.no_grad():
        next(model.denoiser.parameters()).mul_(0.5)
    assert added() == 1


@pytest.mark.slow
def test_in_half_precision_attacks_without_gradients_are_tried(tiny_sd):
    half = open_model(tiny_sd, dtype=torch.bfloat16)
    half.defaults |= {"steps": 2, "guidance_scale": 2.0}
    attacks = make_attacks(["paraphrases", "latent_search"])
    found = audit(half, half, Concept("cat", "dog"), study(), Constant(True), attacks, pictures=2)
    assert [trial.name for trial in found.trials] == ["paraphrases"]
    assert found.skipped["latent_search"].startswith("it follows gradients, which takes float32")


@pytest.mark.slow
def test_what_cannot_be_attacked_is_refused_before_anything_is_studied(model, tiny_sd, monkeypatch):
    def studied(*arguments):
        raise AssertionError("the study is the costly part")

    monkeypatch.setattr(module, "run_study", studied)
    half = open_model(tiny_sd, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="in float32 and the edited model in bfloat16: open both"):
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
