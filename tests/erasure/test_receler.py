"""Receler: the adversary makes it harder, adapters are quiet elsewhere, and its first loss is ESD's."""

from dataclasses import replace

import pytest
import torch

from sublimate.diffusion.conditions import Condition
from sublimate.erasure import targets
from sublimate.erasure.concept_maps import concept_maps
from sublimate.erasure.methods.receler import RecelerConfig, RecelerObjective, outside_error
from sublimate.erasure.request import Request
from sublimate.pipelines.model import open_model
from sublimate.training.objective import Batch
from sublimate.training.randomness import SampleRandom

SMALL = {"rank": 4, "adversary_rows": 3, "sampling_steps": 4, "train_batch_size": 2, "templates": ("a {} in red",)}


@pytest.fixture
def model(tiny_sd):
    return open_model(tiny_sd)


def objective_of(model, **options):
    return RecelerObjective(model, RecelerConfig(**{**SMALL, **options}), Request("van gogh"), seed=3)


def prepared(objective, samples=4):
    batch = Batch(Condition(), SampleRandom(0, 0, "student", range(samples)))
    with torch.no_grad():
        return objective.prepare(objective.turns(0)[0], batch, 0)


def moved(objective):
    """An objective whose adapters say something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in objective.player.trainable().values():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return objective


def test_it_starts_as_the_model_and_without_adversary_its_first_loss_is_esds(model):
    objective = objective_of(model, adversary_steps=0, localise=0.0)
    batch = prepared(objective)
    told = objective.asked(batch)
    x_t, t = batch["x_t"], batch["t"]
    with torch.no_grad():
        null, concept = (model.denoiser(x_t, t, c) for c in (objective.null, told))
        assert torch.equal(objective.student(x_t, t, told).output, concept.output)
        expected = targets.squared_error(concept, targets.negative_guidance(null, concept, 1.0)).mean()
    torch.testing.assert_close(objective.loss(objective.turns(0)[0], batch, 0).total, expected)


def error_of(objective, batch, text):
    with torch.no_grad():
        concept = objective.frozen(batch["x_t"], batch["t"], objective.asked(batch))
        said = objective.student(batch["x_t"], batch["t"], objective.asked(batch).replace(text=text))
    return float((said.output - concept.output).square().mean())


@pytest.mark.slow
def test_the_adversary_brings_the_student_back_and_writes_only_its_rows(model):
    objective = moved(objective_of(model, adversary_steps=40))
    batch = prepared(objective)
    plain = objective.asked(batch)["text"]
    changed = (batch["text"] != plain).any(-1)
    assert torch.equal(changed, objective.free[batch["rows"]])
    assert changed.sum(1).eq(3).all()
    once = prepared(moved(objective_of(model, adversary_steps=1)))
    assert error_of(objective, batch, batch["text"]) < 0.95 * error_of(objective, batch, once["text"])


def test_the_rows_after_the_concept_are_free(model):
    objective = objective_of(model)
    text = "a van gogh in red"
    (span,) = model.find_concept(text, "van gogh")
    assert objective.own[0].nonzero().flatten().tolist() == list(range(span.start, span.stop))
    assert objective.free[0].nonzero().flatten().tolist() == list(range(span.stop, span.stop + 3))
    # What does not fit is left out.
    assert int(objective_of(model, adversary_rows=99).free[0].nonzero().max()) == span.last - 1


@pytest.mark.slow
def test_samples_are_independent(model):
    whole, part = (prepared(moved(objective_of(model, adversary_steps=3)), n) for n in (4, 2))
    torch.testing.assert_close(part["text"], whole["text"][:2])
    torch.testing.assert_close(part["elsewhere"], whole["elsewhere"][:2])


def test_adapters_are_held_where_the_concept_is_not(model):
    objective = moved(objective_of(model, adversary_steps=0))
    batch = prepared(objective)
    turn = objective.turns(0)[0]
    logs = objective.loss(turn, batch, 0).logs
    nowhere = batch.adding(elsewhere=torch.zeros_like(batch["elsewhere"]))
    assert float(objective.loss(turn, nowhere, 0).logs["localise"]) == 0 < float(logs["localise"])
    heavy = replace(objective.loss(turn, batch, 0)).total - objective_of_total(objective, batch, 0.0)
    torch.testing.assert_close(heavy, 0.1 * logs["localise"])


def test_elsewhere_is_where_the_frozen_network_does_not_look_for_the_concept(model):
    objective = objective_of(model, adversary_steps=0, threshold=0.4)
    batch = prepared(objective)
    told, rows = objective.asked(batch), objective.own[batch["rows"]]
    maps = concept_maps(model.denoiser, batch["x_t"], batch["t"], told, rows)[1]
    assert torch.equal(batch["elsewhere"].bool(), maps < 0.4)
    assert 0 < batch["elsewhere"].mean() < 1


def objective_of_total(objective, batch, localise):
    other = objective.config.model_copy(update={"localise": localise})
    objective.config, kept = other, objective.config
    total = objective.loss(objective.turns(0)[0], batch, 0).total
    objective.config = kept
    return total


def test_the_outside_error_counts_masked_places_at_any_resolution_and_shape():
    answer = torch.arange(8.0).reshape(1, 8, 1).expand(1, 8, 2)  # 2 x 4 places
    elsewhere = torch.tensor([[1.0, 0.0]]).reshape(1, 1, 1, 2)  # the left half
    left = torch.tensor([0.0, 1.0, 4.0, 5.0]).square().mean()
    torch.testing.assert_close(outside_error(answer, elsewhere), left)
    fine = elsewhere.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(outside_error(answer, fine), left)


def test_a_concept_map_is_the_attention_to_its_rows(model):
    told = model.encode_prompts(["a red cat", "the dog"])
    x_t, t = torch.randn(2, *model.latent_shape), torch.full((2,), 500.0)
    rows = torch.zeros(2, told["text"].shape[1], dtype=torch.bool)
    rows[:, 2:4] = True
    prediction, maps = concept_maps(model.denoiser, x_t, t, told, rows)
    torch.testing.assert_close(prediction.output, model.denoiser(x_t, t, told).output)
    assert maps.amin((1, 2, 3)).tolist() == [0.0, 0.0] and maps.amax((1, 2, 3)).tolist() == [1.0, 1.0]
    # By the layers' own arithmetic, in the only resolution of attention that the tiny network has.
    seen = []

    def look(layer, inputs, kwargs, output):
        q, k = layer.to_q(inputs[0]), layer.to_k(kwargs["encoder_hidden_states"])
        q, k = (layer.head_to_batch_dim(x) for x in (q, k))
        scores = layer.get_attention_scores(q, k).unflatten(0, (2, -1)).mean(1)
        seen.append(scores[..., 2:4].mean(-1))

    handles = [
        layer.register_forward_hook(look, with_kwargs=True)
        for name, layer in model.denoiser.network.named_modules()
        if name.endswith("attn2")
    ]
    with torch.no_grad():
        model.denoiser(x_t, t, told)
    for handle in handles:
        handle.remove()
    chosen = [share for share in seen if share.shape[1] == maps[0].numel()]
    share = torch.stack(chosen).mean(0)
    stretched = (share - share.amin(1, keepdim=True)) / (share.amax(1, keepdim=True) - share.amin(1, keepdim=True))
    torch.testing.assert_close(maps.flatten(1), stretched)


@torch.no_grad()
def test_masked_padding_is_looked_at_by_none_and_opened_for_the_adversary(tiny_pixart):
    model = open_model(tiny_pixart)
    told, x_t, t = model.encode_prompts(["a red cat"]), torch.randn(1, 4, 8, 8), torch.full((1,), 500.0)
    rows = torch.zeros(1, told["text"].shape[1], dtype=torch.bool)
    rows[:, 2] = True
    noisy = told.replace(text=torch.where(told["text.mask"][..., None] == 1, told["text"], 9.0))
    (_, maps), (_, again) = (concept_maps(model.denoiser, x_t, t, c, rows) for c in (told, noisy))
    torch.testing.assert_close(maps, again, rtol=1e-4, atol=1e-5)
    objective = objective_of(model, adversary_steps=1, templates=("a {}",))
    batch = prepared(objective)
    plain, opened = objective.asked(batch), objective.opened(batch, objective.asked(batch))
    free = objective.free[batch["rows"]]
    assert torch.equal(opened["text.mask"], plain["text.mask"].masked_fill(free, 1))
    assert free.sum(1).eq(3).all() and not torch.equal(opened["text.mask"], plain["text.mask"])
    assert torch.equal((batch["text"] != plain["text"]).any(-1), free)


def test_weights_rules_have_no_meaning_here():
    with pytest.raises(ValueError, match="weights"):
        RecelerConfig(weights="u")
