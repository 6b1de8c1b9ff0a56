"""What erasers tell a network that reads the guidance scale as an input, in targets and student."""

import pytest
import torch

from sublimate.diffusion.conditions import Condition
from sublimate.erasure.eraser import Eraser
from sublimate.erasure.fine_tuning import FineTuningEraser
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.model import open_model
from sublimate.training import registry
from sublimate.training.objective import Batch
from sublimate.training.randomness import SampleRandom

ERASERS = "sublimate.erasure.methods"
# Samplings of one step: x_t is noise, so no sampling tells the network anything.
ROLLED = {"sampling_steps": 1, "updates_per_rollout": 1}
PICTURED = {"images": 1, "sampling_steps": 1}
CASES = {
    "esd": {**ROLLED, "null_pin": 1.0},
    "all_but_one": ROLLED,
    "adv_unlearn": {**ROLLED, "warmup_steps": 0, "adversary_steps": 1},
    "concept_ablation": {**PICTURED, "prior": 1.0},
    "salun": {**PICTURED, "weights": "x"},
    "l1_sparse": {**PICTURED, "weights": "x"},
    "few_shot": {**PICTURED, "retain": 1.0, "held_out": 1},
    "one_step": {"times": (1.0,), "guidance_scale": 3.5},
}
REFUSE_FLUX = {"receler", "image_to_image"}


@pytest.fixture(scope="module")
def flux(tiny_flux):
    return open_model(tiny_flux)


def told_in_training(model, method, **options):
    """The guidance scales that the network is told in a step, without what is done before."""
    eraser = registry.load(ERASERS, method, Eraser)(**{**CASES[method], **options})
    concept = Concept("cat", anchor="dog" if eraser.uses_anchor else "")
    objective, found = eraser.objective(model, eraser.config, Request(concept, preserve=["seven"])), []
    hooks = [
        network.register_forward_pre_hook(
            lambda _, args, said: found.extend(said["guidance"].tolist()), with_kwargs=True
        )
        for network in (objective.student.network, objective.frozen.network)
    ]
    with torch.no_grad():
        for turn in objective.turns(0):
            batch = objective.prepare(turn, Batch(Condition(), SampleRandom(0, 0, turn.name, range(2))), 0)
            objective.loss(turn, batch, 0)
    if isinstance(getattr(objective, "held_out", None), list):
        objective.measure()
    for hook in hooks:
        hook.remove()
    return set(found)


def test_every_eraser_that_trains_through_the_denoiser_is_here():
    kinds = {name: registry.load(ERASERS, name, Eraser) for name in registry.available(ERASERS)}
    assert {name for name, kind in kinds.items() if issubclass(kind, FineTuningEraser)} == CASES.keys() | REFUSE_FLUX


@pytest.mark.parametrize("method", CASES)
def test_targets_and_student_are_told_what_the_model_is_drawn_with(flux, method):
    assert flux.guidance_scale == 3.5
    assert told_in_training(flux, method) == {3.5}
    assert told_in_training(flux, method, guidance_scale=2.0) == {2.0}


def test_a_sampling_is_told_its_own(flux):
    told = told_in_training(flux, "esd", sampling_steps=40, start_guidance=6.0, retain=0.0)
    assert told == {6.0, 3.5}


def test_within_a_context_all_are_told_the_same(flux):
    kind = registry.load(ERASERS, "esd", Eraser)
    objective = kind.objective(flux, kind.Config(guidance_scale=5.0), Request("cat", within="a photo"))
    assert objective.context.condition(torch.tensor([0, 0]), "cpu")["guidance"].tolist() == [5.0, 5.0]


def test_a_network_that_reads_none_is_told_none(tiny_sd):
    model, kind = open_model(tiny_sd), registry.load(ERASERS, "esd", Eraser)
    objective = kind.objective(model, kind.Config(), Request("cat"))
    assert "guidance" not in objective.null and "guidance" not in objective.erased.condition(torch.tensor([0]), "cpu")
    with pytest.raises(ValueError, match="reads no guidance as an input: leave out guidance_scale"):
        kind.objective(model, kind.Config(guidance_scale=3.5), Request("cat"))
