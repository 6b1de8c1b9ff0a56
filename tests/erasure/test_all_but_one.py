"""All but One: its loss is its formula, and training moves the guidance and not the unconditional branch."""

import pytest
import torch
from erasing import disturb

from sublimate.diffusion.conditions import Condition
from sublimate.erasure.methods.all_but_one import AllButOne, AllButOneConfig, AllButOneObjective
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.model import open_model
from sublimate.training.objective import Batch
from sublimate.training.randomness import SampleRandom

CAT = Request(Concept("cat", anchor="dog"), preserve=["seven"])
NOTHING = Request(Concept("cat"))
OPTIONS = {"sampling_steps": 2, "updates_per_rollout": 1}


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return open_model(tiny_sd)


def start(model, request, **options):
    objective = AllButOneObjective(model, AllButOneConfig(**{**OPTIONS, **options}), request)
    (turn,) = objective.turns(0)
    with torch.no_grad():
        batch = objective.prepare(turn, Batch(Condition(), SampleRandom(0, 0, "student", range(4))), 0)
    return objective, turn, batch


def said(model, batch, *prompts):
    with torch.no_grad():
        return [model.denoiser(batch["x_t"], batch["t"], model.encode_prompts([p])).output for p in prompts]


def test_the_loss_is_its_formula(sd):
    objective, turn, batch = start(sd, CAT, null_pin=0.3, retain=0.7)
    disturb(objective)
    cat, null, dog = said(sd, batch, "cat", "", "dog")
    with torch.no_grad():
        loss = objective.loss(turn, batch, 0)
        u, n = (objective.student(batch["x_t"], batch["t"], sd.encode_prompts([p])).output for p in ("cat", ""))
    guidance = ((u - n) - (dog - null)).square().mean()
    pinned = (n - null).square().mean()
    assert min(guidance, pinned, loss.logs["retain"]) > 1e-6
    torch.testing.assert_close(loss.logs["erase"], guidance)
    torch.testing.assert_close(loss.total, guidance + 0.3 * pinned + 0.7 * loss.logs["retain"])
    assert not torch.allclose(cat, dog)


def test_without_anchor_the_concept_has_no_say(sd):
    _, _, batch = start(sd, NOTHING)
    torch.testing.assert_close(batch["aimed"], batch["null"])


def test_repulsion_is_against_the_concepts_own_guidance(sd):
    _, _, batch = start(sd, NOTHING, repulsion=1.5)
    cat, null = said(sd, batch, "cat", "")
    torch.testing.assert_close(batch["aimed"] - batch["null"], -1.5 * (cat - null))
    with pytest.raises(ValueError, match="leave out the anchor"):
        start(sd, CAT, repulsion=1.5)


@pytest.mark.parametrize("detach", [False, True])
def test_the_null_branch_is_pushed_by_the_guidance_term_unless_detached(sd, detach):
    # Text-free weights of the student reach both branches: what the null branch gets is the gradient through n.
    objective, turn, batch = start(sd, NOTHING, detach_null=detach, null_pin=0.0, weights="full")
    disturb(objective)
    objective.player.set_trainable(True)
    seen = []
    objective.student.register_forward_hook(
        lambda module, args, out: seen.append(out.output) if len(args[2]["text"]) == 1 else None
    )
    loss = objective.loss(turn, batch, 0)
    (n,) = seen
    (gradient,) = torch.autograd.grad(loss.total, n, allow_unused=True)
    # With detach the pin alone, of weight 0, reaches n.
    assert (float(gradient.abs().max()) > 0) != detach


@pytest.mark.slow
def test_training_moves_the_guidance_to_the_anchors(sd):
    options = {"weights": "x", "learning_rate": 3e-3, "max_train_steps": 15, "train_batch_size": 4, "retain": 0.0}
    edit = AllButOne(sampling_steps=4, updates_per_rollout=4, **options).fit(sd, CAT)
    x_t = torch.randn(8, *sd.latent_shape, generator=torch.Generator().manual_seed(1))

    def errors():
        with torch.no_grad():
            cat, null = (sd.denoiser(x_t, 500, sd.encode_prompts([p])).output for p in ("cat", ""))
        return ((cat - null) - aim).square().mean(), (null - pinned).square().mean()

    with torch.no_grad():
        dog, pinned = (sd.denoiser(x_t, 500, sd.encode_prompts([p])).output for p in ("dog", ""))
        aim = dog - pinned
    before, _ = errors()
    with edit.applied(sd):
        after, drift = errors()
    assert after < 0.5 * before and drift < 0.1 * before
