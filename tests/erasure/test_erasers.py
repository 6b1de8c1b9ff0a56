"""One property matrix over all erasers, on tiny checkpoints of real classes of the families that read text."""

import contextlib
from functools import cache

import pytest
import torch
from grid import called, opened, refusals, rows

from sublimate.erasure.eraser import Eraser
from sublimate.erasure.fine_tuning import FineTuningEraser, NoData, trainer_config
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.edit import Edit
from sublimate.pipelines.model import open_model
from sublimate.training import registry
from sublimate.training.randomness import SampleRandom
from sublimate.training.trainer import Trainer

ERASERS = "sublimate.erasure.methods"
FAMILIES = {"": ("tiny_sd", "tiny_sd_v", "tiny_sd3"), "image_to_image": ("tiny_inpainting",)}

PICTURED = {"images": 2, "sampling_steps": 1, "max_train_steps": 2, "train_batch_size": 2, "learning_rate": 1e-3}


def unguided(*names, **options):
    """Options whose guidance is its default, or none where a model has nothing to lead away from."""
    return lambda model: options if model.null_condition() else {**options, **dict.fromkeys(names, 1.0)}


RECELER = {
    "rank": 4,
    "adversary_rows": 2,
    "adversary_steps": 2,
    "sampling_steps": 2,
    "max_train_steps": 2,
    "train_batch_size": 2,
    "learning_rate": 1e-3,
}

# name: (method, options). A new eraser adds its rows here, one of them named as the method.
CASES = {
    "uce": ("uce", {}),
    "uce-last": ("uce", {"tokens": "last"}),
    "rece": ("rece", {"rounds": 2}),
    "mace_fusion": ("mace_fusion", {}),
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
    "concept_ablation": ("concept_ablation", unguided("start_guidance", **PICTURED)),
    "salun": ("salun", unguided("start_guidance", "saliency_guidance", **PICTURED, weights="x")),
    "l1_sparse": ("l1_sparse", {**PICTURED, "weights": "x", "start_guidance": 1.0}),
    "prune_then_erase": (
        "prune_then_erase",
        lambda model: {
            "then": "salun",
            "options": unguided("start_guidance", "saliency_guidance", **PICTURED)(model),
            "sparsity": 0.3,
        },
    ),
    "prune_then_erase-closed": ("prune_then_erase", {"then": "uce", "sparsity": 0.3}),
    "image_to_image": ("image_to_image", {**PICTURED, "start_guidance": 1.0}),
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
    "interpret_then_deactivate": (
        "interpret_then_deactivate",
        {
            "autoencoder": {"expansion": 4, "k": 4, "aux_k": 8, "learning_rate": 1e-2},
            "features": 16,
            "max_train_steps": 10,
            "train_batch_size": 4,
        },
    ),
    "receler": ("receler", RECELER),
    "prune_then_erase-attached": ("prune_then_erase", {"then": "receler", "options": RECELER, "sparsity": 0.3}),
    "adv_unlearn": (
        "adv_unlearn",
        {
            "warmup_steps": 1,
            "adversary_steps": 2,
            "sampling_steps": 2,
            "max_train_steps": 2,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
        },
    ),
    "esd-lora": (
        "esd",
        {
            "lora_rank": 2,
            "weights": "x",
            "sampling_steps": 2,
            "max_train_steps": 2,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
        },
    ),
    "concept_ablation-lora": (
        "concept_ablation",
        unguided("start_guidance", **PICTURED, lora_rank=2, lora_alpha=4, weights="u"),
    ),
    "esd": ("esd", {"sampling_steps": 2, "max_train_steps": 2, "train_batch_size": 2, "learning_rate": 1e-3}),
}

# Why a method may refuse a family.
REASONS = (
    "works in a single text encoder of CLIP",
    "has no cross-attention",
    "has no CLIP text encoder",
    "is shown no pictures",
    "has no null condition",
    "text belongs to one concept",
    "knows no prompts",
    "No text enters",
    "sees pictures beside the text",
    "draws nothing from text alone",
    "is a student of one or few steps",
)

# What is tested to be refused even where not all families are.
REFUSED = (
    ("interpret_then_deactivate", "tiny_sd3"),
    ("receler", "tiny_sd3"),
    ("prune_then_erase-attached", "tiny_sd3"),
    ("esd", "tiny_upscaling"),
    *((case, "tiny_sd_turbo") for case in ("esd", "concept_ablation", "few_shot", "slug")),
)

# What training runs beside the denoiser.
READ = {
    **dict.fromkeys(("few_shot", "adv_unlearn"), ("text_encoder", "text_encoder_2", "text_encoder_3")),
    "image_to_image": ("vae",),
}


def test_every_eraser_has_a_row():
    missing = set(registry.available(ERASERS)) - set(CASES)
    assert not missing, f"add a row of that name to CASES for {', '.join(sorted(missing))}"


@pytest.fixture
def model(request, family):
    return opened(request.getfixturevalue(family))


@pytest.fixture
def edit(request, family, case):
    with refusals(*REASONS):
        return _fitted_once(request.getfixturevalue(family), case)


@pytest.mark.parametrize(("case", "family"), REFUSED)
def test_a_family_that_does_not_fit_is_refused_and_left_alone(request, case, family):
    model = open_model(request.getfixturevalue(family))
    before = bits(model)
    with pytest.raises(ValueError) as refusal:
        fit(model, case)
    assert any(reason in str(refusal.value) for reason in REASONS)
    assert bits(model) == before


def eraser_of(model, case):
    method, options = CASES[case]
    return registry.load(ERASERS, method, Eraser)(**(options(model) if callable(options) else options))


def fit(model, case, seed=0):
    eraser = eraser_of(model, case)
    cat, dog, seven, red = called(model, "cat", "dog", "seven", "red")
    concept = Concept(cat, anchor=dog if eraser.uses_anchor else "")
    return eraser.fit(model, Request(concept, preserve=[seven, red]), seed=seed)


@cache
def _fitted_once(folder, case):
    return fit(opened(folder), case)


def fitted(model, case, seed=0):
    with refusals(*REASONS):
        return fit(model, case, seed)


def bits(model):
    return {key: p.detach().numpy().tobytes() for key, p in model.parameters().items()}


@torch.no_grad()
def answer(model):
    """What the model predicts when asked for a cat: of text, weights and attachments."""
    x_t, told = torch.ones(1, *model.latent_shape), model.encode_prompts(called(model, "cat"))
    if model.backbone.shown:
        random = SampleRandom(0, 0, "answer", [0])
        told = told.replace(**model.backbone.show_examples(model.pipeline, model.render(x_t), random))
    return model.denoiser(x_t, model.schedule.t_max / 2, told).output


def pytest_generate_tests(metafunc):
    if metafunc.cls is TestEraser:
        metafunc.parametrize(("case", "family"), rows(metafunc, CASES, FAMILIES))


class TestEraser:
    @pytest.mark.slow
    def test_a_fit_leaves_the_model_and_the_global_generator_alone(self, model, case):
        before, state = bits(model), torch.get_rng_state()
        fitted(model, case)
        assert bits(model) == before
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_edit_changes_keys_that_it_names_and_comes_off_bit_by_bit(self, model, edit, case):
        assert eraser_of(model, case).low_rank == (bool(edit.low_rank) and not edit.values)
        before, said = bits(model), answer(model)
        edit.apply(model)
        after = bits(model)
        changed = {key for key in before if after[key] != before[key]}
        # Not all of them: some layers' outputs are never read, as queries of text in SD3's last block.
        assert changed <= edit.shapes().keys()
        assert len(changed) > len(edit.shapes()) / 2 or edit.attachment is not None
        assert not torch.equal(answer(model), said)
        edit.remove(model)
        assert bits(model) == before and torch.equal(answer(model), said)

    @pytest.mark.slow
    def test_networks_that_training_does_not_run_are_told_from_those_it_does(self, request, family, case):
        model = open_model(request.getfixturevalue(family))
        eraser = eraser_of(model, case)
        if not isinstance(eraser, FineTuningEraser):  # the trainer trains nothing
            return
        cat, dog, seven = called(model, "cat", "dog", "seven")
        asked = Request(Concept(cat, anchor=dog if eraser.uses_anchor else ""), preserve=[seven])
        with refusals(*REASONS):
            objective = eraser.objective(model, eraser.config, asked)
        unread = objective.unread(model)
        trainer = Trainer(objective, NoData(), trainer_config(eraser.config), progress=False)
        for name in unread:
            model.component(name).to("meta")  # whoever reads it fails, or trains on nothing
        for trainer.step in range(2):
            for turn in objective.turns(trainer.step):
                trainer.accumulate(turn)
                assert all(p.grad.isfinite().all() for p in objective.player.trainable().values())
                trainer.update(turn)
            objective.after_step(trainer.step)
        read = model.components().keys() - {*unread, model.backbone.network_attribute}
        assert read == {name for name in READ.get(eraser.name(), ()) if name in model.components()}

    @pytest.mark.slow
    @pytest.mark.first_family
    def test_the_file_holds_the_same_edit(self, model, edit, tmp_path):
        again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
        assert again.provenance == edit.provenance
        assert edit.provenance["base"]["content_hash"] == model.content_hash()
        with edit.applied(model):
            expected, said = bits(model), answer(model)
        with again.applied(model):
            assert bits(model) == expected and torch.equal(answer(model), said)

    @pytest.mark.slow
    @pytest.mark.first_family
    def test_a_fit_of_one_seed_repeats(self, model, case, edit):
        with edit.applied(model):
            expected, said = bits(model), answer(model)
        with fitted(model, case).applied(model):
            assert bits(model) == expected and torch.equal(answer(model), said)

    @pytest.mark.slow
    @pytest.mark.first_family
    def test_what_is_edited_already_can_be_edited_again(self, model, case, edit):
        before, plain = bits(model), answer(model)
        edit.apply(model)
        between, said = bits(model), answer(model)
        second = fitted(model, case, seed=1)
        second.apply(model)
        second.remove(model)
        assert bits(model) == between and torch.equal(answer(model), said)
        edit.remove(model)
        assert bits(model) == before and torch.equal(answer(model), plain)


PICTURED_BY = {"salun", "slug", "image_to_image", "few_shot"}
KEPT_BY = {"salun", "slug", "image_to_image", "concept_ablation", "l1_sparse"}


@pytest.mark.parametrize("method", registry.available(ERASERS))
def test_what_a_request_says_in_vain_is_told(method, caplog):
    eraser = registry.load(ERASERS, method, Eraser)(**({"then": "esd"} if method == "prune_then_erase" else {}))
    pictured = Concept("cat", images=("cat.png",))
    for request, readers in ((Request(pictured), PICTURED_BY), (Request("dog", preserve=[pictured]), KEPT_BY)):
        with contextlib.nullcontext() if method in readers else pytest.raises(ValueError, match="pictures of 'cat'"):
            eraser.check(request)
    assert not caplog.messages
    eraser.check(Request(Concept("cat", anchor="dog")))
    assert ("reads no anchor of 'cat': it has no effect" in caplog.text) == (not eraser.uses_anchor)
