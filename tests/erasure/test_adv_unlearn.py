"""AdvUnlearn: ESD's target for the text encoder, and prefixes that bring the concept back."""

import pytest
import torch

from sublimate.diffusion.conditions import Condition
from sublimate.erasure import targets
from sublimate.erasure.methods.adv_unlearn import AdvUnlearnConfig, AdvUnlearnObjective
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.model import open_model
from sublimate.training.objective import Batch
from sublimate.training.randomness import SampleRandom

SMALL = {"sampling_steps": 4, "train_batch_size": 2, "templates": ("a {}",), "warmup_steps": 2, "adversary_steps": 3}


@pytest.fixture
def model(tiny_sd):
    return open_model(tiny_sd)


def objective_of(model, preserve=(), **options):
    return AdvUnlearnObjective(model, AdvUnlearnConfig(**{**SMALL, **options}), Request("cat", preserve), seed=3)


def prepared(objective, step=0, samples=4):
    batch = Batch(Condition(), SampleRandom(0, step, "student", range(samples)))
    with torch.no_grad():
        return objective.prepare(objective.turns(step)[0], batch, step)


def moved(objective, size=0.1):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in objective.player.trainable().values():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return objective


def test_the_warm_up_is_esd_with_the_text_encoder(model):
    objective = moved(objective_of(model))
    batch = prepared(objective, step=1)
    assert not any(name.startswith("prefix") for name in batch.tensors)
    x_t, t = batch["x_t"], batch["t"]
    told = model.encode_prompts(["a cat"] * 4)
    with torch.no_grad():
        null, concept = (model.denoiser(x_t, t, c) for c in (model.null_condition(), told))
        target = targets.negative_guidance(null, concept, 1.0)
        student = model.denoiser(x_t, t, objective.text.encode_prompts(["a cat"] * 4))
    objective.player.set_trainable(True)
    loss = objective.loss(objective.turns(1)[0], batch, 1)
    torch.testing.assert_close(loss.total, targets.squared_error(student, target).mean())
    loss.total.backward()
    assert all(p.grad is None for p in model.parameters().values())
    assert any(p.grad is not None for p in objective.player.trainable().values())


@pytest.mark.slow
def test_the_prefix_brings_the_concept_back_and_the_loss_is_taken_there(model):
    objective = moved(objective_of(model, adversary_steps=20, adversary_rate=0.02))
    batch = prepared(objective, step=2)
    found, plain = batch["prefix_text_encoder"], objective.plain["text_encoder"]
    assert found.shape == (4, 1, plain.shape[1]) and not torch.equal(found, plain.expand_as(found))
    errors = {}
    for name, prefix in (("found", found), ("plain", plain.expand(4, -1, -1))):
        with torch.no_grad():
            said = objective.attacked(batch, {"text_encoder": prefix})
        errors[name] = float((said.output - batch["concept"]).square().mean())
    assert errors["found"] < 0.9 * errors["plain"]
    with torch.no_grad():
        said = objective.attacked(batch, {"text_encoder": found})
    loss = objective.loss(objective.turns(2)[0], batch, 2)
    torch.testing.assert_close(loss.total, (said.output - batch["target"]).square().mean())


def test_one_step_of_the_adversary_goes_against_the_sign_of_the_gradient(model):
    objective = moved(objective_of(model, adversary_steps=1, adversary_rate=0.5))
    batch = prepared(objective, step=2)
    step = batch["prefix_text_encoder"] - objective.plain["text_encoder"]
    assert set(step.abs().round(decimals=4).unique().tolist()) <= {0.0, 0.5}
    prefix = objective.plain["text_encoder"].expand(4, -1, -1).clone().requires_grad_(True)
    error = (objective.attacked(batch, {"text_encoder": prefix}).output - batch["concept"]).square().sum()
    (gradient,) = torch.autograd.grad(error, [prefix])
    assert torch.equal(step.sign(), -gradient.sign())


@pytest.mark.slow
def test_samples_are_independent(model):
    whole, part = (prepared(moved(objective_of(model)), 2, n) for n in (4, 2))
    # Signs of gradients near zero may differ by rounding.
    same = (part["prefix_text_encoder"] - whole["prefix_text_encoder"][:2]).abs() < 1e-6
    assert same.float().mean() > 0.95


@pytest.mark.slow
def test_preserved_concepts_are_held_where_they_were(model):
    objective = objective_of(model, preserve=("dog",))
    batch = prepared(objective)
    assert float(objective.loss(objective.turns(0)[0], batch, 0).logs["retain"]) < 1e-10
    logs = moved(objective).loss(objective.turns(0)[0], batch, 0).logs
    assert float(logs["retain"]) > 1e-6


def test_a_prompt_without_room_for_the_prefix_is_refused(model):
    long = " ".join(["cat"] + ["dog"] * 13)
    model.encode_prompts([long])
    with pytest.raises(ValueError, match="shorten it"):
        AdvUnlearnObjective(
            model,
            AdvUnlearnConfig(**{**SMALL, "adversary_tokens": 4, "templates": ("{}",)}),
            Request(Concept("cat", prompts=(long,))),
        )
