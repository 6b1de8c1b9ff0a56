"""Pruning before erasing: which weights go, that they stay gone, and that the other eraser does the rest."""

import pytest
import torch

from sublimate.erasure.methods.prune_then_erase import PruneThenErase, PruneThenEraseConfig, magnitude_masks
from sublimate.erasure.methods.salun import SalUn
from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.model import open_model
from sublimate.training.config import ConfigError, validate_section
from sublimate.training.players import PlayerConfig, make_player

CAT = Request(Concept("cat", anchor="dog"), preserve=["seven", "red"])
SMALL = {"images": 2, "sampling_steps": 1, "max_train_steps": 3, "train_batch_size": 2, "learning_rate": 1e-2}


@pytest.fixture
def sd(tiny_sd):
    return open_model(tiny_sd)


def edited(edit, model):
    with edit.applied(model, allow_other_base=True):
        return {key: p.detach().clone() for key, p in model.parameters().items()}


def test_the_smallest_weights_of_all_layers_together_go(sd):
    masks, parameters = magnitude_masks(sd, 0.4), sd.parameters()
    layers = {key: p for key, p in parameters.items() if key.startswith("unet/") and p.ndim > 1}
    assert masks.keys() <= layers.keys() and len(masks) > len(layers) / 2
    everything = torch.cat([p.detach().abs().flatten() for p in layers.values()]).sort().values
    threshold = everything[int(0.4 * len(everything))]
    for key, p in layers.items():
        assert torch.equal(masks.get(key, torch.ones_like(p, dtype=torch.bool)), p.abs() >= threshold)
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert pruned == int(0.4 * len(everything))
    assert magnitude_masks(sd, 0.0) == {}


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["full", "x"])
def test_what_is_pruned_stays_zero_while_the_rest_trains(sd, weights):
    options = {**SMALL, "weights": weights, "saliency": 1.0}
    masks = magnitude_masks(sd, 0.4)
    after = edited(PruneThenErase(then="salun", options=options, sparsity=0.4).fit(sd, CAT), sd)
    moved = 0
    for key, mask in masks.items():
        assert not after[key][~mask].any()
        moved += int((after[key][mask] != sd.parameters()[key][mask]).sum())
    assert moved > 1000
    # Without the masks training moves them.
    loose = edited(SalUn(**options).fit(sd, CAT), sd)
    assert any((loose[key][~mask] != sd.parameters()[key][~mask]).any() for key, mask in masks.items())


@pytest.mark.parametrize(
    ("then", "eraser", "options"),
    [("uce", UCE, {"tokens": "last"}), ("salun", SalUn, {**SMALL, "weights": "x"})],
)
@pytest.mark.slow
def test_without_pruning_it_is_the_other_eraser(sd, then, eraser, options):
    expected = edited(eraser(**options).fit(sd, CAT, seed=2), sd)
    found = edited(PruneThenErase(then=then, options=options, sparsity=0).fit(sd, CAT, seed=2), sd)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.slow
def test_a_closed_form_edits_the_pruned_model_and_zeros_stay_elsewhere(sd):
    options = {"tokens": "last", "templates": ["{}", "a {}"]}
    masks = magnitude_masks(sd, 0.4)
    found = edited(PruneThenErase(then="uce", options=options, sparsity=0.4).fit(sd, CAT), sd)
    with torch.no_grad():
        for key, mask in masks.items():
            sd.parameters()[key].mul_(mask)
    plain = UCE(**options).fit(sd, CAT)
    expected = edited(plain, sd)
    for key, value in expected.items():
        assert torch.equal(found[key], value)
        if key in masks:
            assert bool(found[key][~masks[key]].any()) == (key in plain.low_rank)


def test_the_provenance_has_both(sd):
    config = PruneThenErase(then="uce", options={"lam": 0.7}).fit(sd, CAT).provenance["config"]
    assert config["then"] == "uce" and config["sparsity"] == 0.1
    assert config["options"] == UCE.Config(lam=0.7).model_dump(mode="json")


def test_it_answers_for_the_other_eraser(sd):
    esd = PruneThenErase(then="esd")
    assert esd.handles_within and not esd.uses_anchor and not esd.uses_images
    salun = PruneThenErase(then="salun")
    assert salun.uses_anchor and salun.uses_images and not salun.handles_within
    with pytest.raises(ValueError, match="cannot erase within"):
        salun.fit(sd, Request("cat", within="photo"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"then": "use"}, "There is no method 'use' .* did you mean 'uce'"),
        ({"then": "uce", "options": {"template": ["{}"]}}, "did you mean 'options.templates'"),
        ({"then": "uce", "options": {"lam": -1}}, "options.lam"),
        ({"then": "prune_then_erase"}, "not by itself"),
        ({}, "'prune_then_erase.then' is missing"),
        ({"then": "uce", "sparsity": 1.0}, "sparsity"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        validate_section(PruneThenEraseConfig, options, "prune_then_erase")


def test_weight_decay_would_move_masked_weights():
    layer = torch.nn.Linear(2, 2)
    player = make_player(layer, PlayerConfig(adam_weight_decay=0.1))
    with pytest.raises(ValueError, match="moves masked weights"):
        player.restrict({"weight": torch.zeros(2, 2, dtype=torch.bool)})
