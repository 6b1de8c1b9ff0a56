"""SPEED: constraints hold exactly, nothing within them is better, and it is the authors' formula."""

import pytest
import torch

from sublimate.erasure import closed_form
from sublimate.erasure.methods.speed import SPEED, _fixed_rows
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.text_layers import text_layers
from sublimate.erasure.token_rows import concept_rows
from sublimate.pipelines.model import open_model

CAT = Request(Concept("cat", "dog"), preserve=["seven", "red", "painting"])
TEMPLATES = ("{}", "a {}")
PLAIN = {"templates": TEMPLATES, "influence_filter": False, "augmentations": 0, "threshold": 0.5, "lam": 0.3}


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return open_model(tiny_sd)


def changes(model, edit):
    weights = {layer.key: layer.weight for layer in text_layers(model)}
    return {key: (weights[key], b.double() @ a.double()) for key, (b, a) in edit.low_rank.items()}


def rows(model):
    erased = concept_rows(model, CAT.erase, TEMPLATES, "last", anchored=True)["text"]
    kept = concept_rows(model, CAT.preserve, TEMPLATES, "last", anchored=False)["text"].own
    return erased, kept, _fixed_rows(model.null_condition()["text"][0].double())


def test_it_is_the_authors_formula_with_the_constraint_solved_exactly(sd):
    erased, kept, fixed = rows(sd)
    size = kept.shape[1]
    eye = torch.eye(size, dtype=torch.float64)
    squares, directions = torch.linalg.eigh(kept.mT @ kept / len(kept))
    quiet = directions[:, squares < PLAIN["threshold"]]
    p, k = quiet @ quiet.mT, fixed.mT
    assert 0 < quiet.shape[1] < size
    t = erased.own.mT @ erased.own / len(erased.own)
    a = erased.anchors.mT @ erased.own / len(erased.own)
    m = torch.linalg.inv(t @ p + PLAIN["lam"] * eye)
    confined = eye - m @ k @ torch.linalg.pinv(k.mT @ p @ m @ k, rtol=1e-10) @ k.mT @ p
    found = changes(sd, SPEED(**PLAIN).fit(sd, CAT))
    assert all(key.endswith("attn2.to_v.weight") for key in found) and len(found) > 1
    for weight, change in found.values():
        expected = weight @ (a - t) @ p @ confined @ m
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_constraints_hold_and_no_change_within_them_is_better(sd):
    erased, kept, fixed = rows(sd)
    basis = closed_form.quiet_directions(kept, 0.5, fixed)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
    assert float((fixed @ basis).abs().max()) < 1e-10
    assert float((kept @ basis).square().mean(0).max()) < 0.5
    generator = torch.Generator().manual_seed(0)
    for weight, change in changes(sd, SPEED(**PLAIN).fit(sd, CAT)).values():
        assert float((change @ fixed.mT).abs().max()) < 1e-6 * float((weight @ fixed.mT).abs().max())

        def objective(d, weight=weight):
            error = (weight + d) @ erased.own.mT - weight @ erased.anchors.mT
            return float(error.square().sum(0).mean() + PLAIN["lam"] * d.square().sum())

        assert objective(change) < objective(torch.zeros_like(change))
        for _ in range(5):
            step = torch.randn(weight.shape[0], basis.shape[1], dtype=torch.float64, generator=generator) @ basis.mT
            assert objective(change + 1e-3 * step) > objective(change)


def test_a_row_in_danger_is_preserved_and_others_are_not(sd):
    erased, kept, _ = rows(sd)
    layer = text_layers(sd)[0]
    only = SPEED(augmentations=0)._preserved(layer, erased, kept, seed=0)
    assert 0 < len(only) < len(kept)
    moved = closed_form.confined_factor(erased.own, torch.eye(kept.shape[1], dtype=torch.float64), len(erased.own))
    change = layer.weight @ (erased.anchors - erased.own).mT @ moved
    worst = (kept @ change.mT).norm(dim=1).argmax()
    assert any(torch.equal(row, kept[worst]) for row in only)


def test_noisy_copies_lie_along_the_direction_that_the_layer_reads_least(sd):
    erased, kept, _ = rows(sd)
    layer = text_layers(sd)[0]
    eraser = SPEED(augmentations=4, influence_filter=False)
    found = eraser._preserved(layer, erased, kept, seed=0)
    assert len(kept) < len(found) <= 5 * len(kept)
    assert torch.equal(found, eraser._preserved(layer, erased, kept, seed=0))
    assert not torch.equal(found[-1], eraser._preserved(layer, erased, kept, seed=1)[-1])
    least = torch.linalg.svd(layer.weight)[2][-1]
    for row in found[len(kept) :]:
        offsets = row - kept
        along = (offsets @ least)[:, None] * least
        assert float((offsets - along).norm(dim=1).min()) < 1e-9


def test_without_preserved_concepts_only_the_empty_prompt_is_held(sd):
    request = Request(Concept("cat", "dog"))
    fixed = _fixed_rows(sd.null_condition()["text"][0].double())
    for weight, change in changes(sd, SPEED(lam=1e-3).fit(sd, request)).values():
        assert float((change @ fixed.mT).abs().max()) < 1e-6 * float((weight @ fixed.mT).abs().max())
        assert float(change.abs().max()) > 0


def test_what_leaves_no_direction_is_refused(sd):
    with pytest.raises(ValueError, match="raise threshold"):
        SPEED(threshold=1e-12, tokens="tail", templates=("{}", "a {}", "the {} of", "{} in red")).fit(sd, CAT)


def test_families_without_values_of_their_own(tiny_sd3):
    with pytest.raises(ValueError, match="set layers to all"):
        SPEED().fit(open_model(tiny_sd3), CAT)


def test_fixed_rows_are_the_first_and_three_centres():
    generator = torch.Generator().manual_seed(0)
    clusters = torch.tensor([[5.0, 0.0], [0.0, 5.0], [-5.0, -5.0]]).double()
    others = (clusters[:, None] + 0.01 * torch.randn(3, 4, 2, generator=generator)).flatten(0, 1)
    found = _fixed_rows(torch.cat([torch.tensor([[9.0, 9.0]]).double(), others]))
    assert found.shape == (4, 2) and found[0].tolist() == [9.0, 9.0]
    expected = others.view(3, 4, 2).mean(1)
    assert all(float((found[1:] - centre).norm(dim=1).min()) < 1e-6 for centre in expected)
    assert _fixed_rows(torch.ones(1, 5).double()).shape == (1, 5)
