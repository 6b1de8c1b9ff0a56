"""One property matrix over all erasers, on tiny checkpoints of real classes of the families that read text."""

import pytest
import torch

from sublimate.erasure.eraser import Eraser
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.edit import Edit
from sublimate.pipelines.model import open_model
from sublimate.training import registry

ERASERS = "sublimate.erasure.methods"
FAMILIES = ("tiny_sd", *(pytest.param(family, marks=pytest.mark.slow) for family in ("tiny_sd_v", "tiny_sd3")))

PICTURED = {"images": 2, "sampling_steps": 1, "max_train_steps": 2, "train_batch_size": 2, "learning_rate": 1e-3}

# name: (method, options). A new eraser adds its rows here, one of them named as the method.
CASES = {
    "uce": ("uce", {}),
    "uce-last": ("uce", {"tokens": "last"}),
    "rece": ("rece", {"rounds": 2}),
    "speed": ("speed", {"layers": "all", "tokens": "tail", "threshold": 1.0, "augmentations": 2}),
    # The matrix's models say no times of their own: they are no students.
    "one_step": (
        "one_step",
        lambda model: {
            "times": (model.schedule.t_max,),
            "max_train_steps": 2,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
        },
    ),
    "concept_ablation": ("concept_ablation", PICTURED),
    "salun": ("salun", {**PICTURED, "weights": "x"}),
    "few_shot": ("few_shot", {**PICTURED, "max_drift": 1e9}),
    "slug": ("slug", {"images": 2, "sampling_steps": 1, "templates": ("{}",), "pair_steps": 3, "max_probes": 2}),
    "all_but_one": (
        "all_but_one",
        {
            "sampling_steps": 2,
            "updates_per_rollout": 2,
            "max_train_steps": 2,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
        },
    ),
    "esd": ("esd", {"sampling_steps": 2, "max_train_steps": 2, "train_batch_size": 2, "learning_rate": 1e-3}),
}


def test_every_eraser_has_a_row():
    missing = set(registry.available(ERASERS)) - set(CASES)
    assert not missing, f"add a row of that name to CASES for {', '.join(sorted(missing))}"


@pytest.fixture(params=FAMILIES)
def model(request):
    return open_model(request.getfixturevalue(request.param))


def fitted(model, case, seed=0):
    method, options = CASES[case]
    options = options(model) if callable(options) else options
    eraser = registry.load(ERASERS, method, Eraser)(**options)
    cat = Concept("cat", anchor="dog" if eraser.uses_anchor else "")
    return eraser.fit(model, Request(cat, preserve=["seven", "red"]), seed=seed)


def bits(model):
    return {key: p.detach().numpy().tobytes() for key, p in model.parameters().items()}


@pytest.mark.parametrize("case", CASES)
class TestEraser:
    def test_a_fit_leaves_the_model_and_the_global_generator_alone(self, model, case):
        before, state = bits(model), torch.get_rng_state()
        fitted(model, case)
        assert bits(model) == before
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_edit_changes_keys_that_it_names_and_comes_off_bit_by_bit(self, model, case):
        edit, before = fitted(model, case), bits(model)
        edit.apply(model)
        after = bits(model)
        changed = {key for key in before if after[key] != before[key]}
        # Not all of them: some layers' outputs are never read, as queries of text in SD3's last block.
        assert changed <= edit.shapes().keys() and len(changed) > len(edit.shapes()) / 2
        edit.remove(model)
        assert bits(model) == before

    def test_the_file_holds_the_same_edit(self, model, case, tmp_path):
        edit = fitted(model, case)
        again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
        assert again.provenance == edit.provenance
        assert edit.provenance["base"]["content_hash"] == model.content_hash()
        with edit.applied(model):
            expected = bits(model)
        with again.applied(model):
            assert bits(model) == expected

    def test_a_fit_of_one_seed_repeats(self, model, case):
        with fitted(model, case, seed=3).applied(model):
            expected = bits(model)
        with fitted(model, case, seed=3).applied(model):
            assert bits(model) == expected

    def test_what_is_edited_already_can_be_edited_again(self, model, case):
        first, before = fitted(model, case), bits(model)
        first.apply(model)
        between = bits(model)
        second = fitted(model, case, seed=1)
        second.apply(model)
        second.remove(model)
        assert bits(model) == between
        first.remove(model)
        assert bits(model) == before
