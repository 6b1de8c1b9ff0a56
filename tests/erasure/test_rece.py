"""RECE against the method written out: full matrices per layer, dense solves, one round after the other."""

import pytest
import torch

from sublimate.erasure import closed_form
from sublimate.erasure.methods.rece import RECE
from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.text_layers import text_layers
from sublimate.erasure.token_rows import concept_rows
from sublimate.pipelines.model import open_model

CAT = Request(Concept("cat", "dog"), preserve=["seven", "red"])
OPTIONS = {"tokens": "last", "templates": ("{}", "a photo of {}"), "preserve_scale": 0.7, "lam": 0.05}


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sd3"])
def model(request):
    return open_model(request.getfixturevalue(request.param))


def rows_of(model, key):
    erased = concept_rows(model, CAT.erase, OPTIONS["templates"], "last", anchored=True)
    kept = concept_rows(model, CAT.preserve, OPTIONS["templates"], "last", anchored=False)
    return erased[key].own, erased[key].anchors, kept[key].own


def dense_edit(weight, own, anchors, kept, held):
    """UCE's minimiser by its normal equations, with further rows held where they are."""
    p, lam = OPTIONS["preserve_scale"], OPTIONS["lam"]
    pinned = p * kept.mT @ kept + held.mT @ held + lam * torch.eye(own.shape[1], dtype=torch.float64)
    return (weight @ anchors.mT @ own + weight @ pinned) @ torch.linalg.inv(own.mT @ own + pinned)


def dense_attack(edited, original, own, lam):
    grams = sum(w.mT @ w for w in edited) + lam * torch.eye(own.shape[1], dtype=torch.float64)
    crossed = sum(w.mT @ o for w, o in zip(edited, original, strict=True))
    return (torch.linalg.inv(grams) @ crossed @ own.mT).mT


def changed(model, edit):
    """The change of each text layer by its key, (d_out, d_in)."""
    layers = {layer.key: layer for layer in text_layers(model)}
    assert edit.shapes().keys() == layers.keys()
    return {k: (b.double() @ a.double())[:, layers[k].columns] for k, (b, a) in edit.low_rank.items()}


@pytest.mark.parametrize("rounds", [1, 3])
def test_it_is_the_alternation_written_out(model, rounds):
    found = changed(model, RECE(rounds=rounds, attack_lam=0.01, **OPTIONS).fit(model, CAT))
    layers = text_layers(model)
    for key in {layer.reads for layer in layers}:
        readers = [layer for layer in layers if layer.reads == key]
        own, anchors, kept = rows_of(model, key)
        original = [layer.weight for layer in readers]
        edited, held = [dense_edit(w, own, anchors, kept, own[:0]) for w in original], own
        for _ in range(rounds):
            recovering = dense_attack(edited, original, own, 0.01)
            edited = [dense_edit(w, recovering, anchors, kept, held) for w in edited]
            held = torch.cat([held, recovering])
        for layer, w, o in zip(readers, edited, original, strict=True):
            torch.testing.assert_close(found[layer.key], w - o, rtol=1e-4, atol=1e-5 * float(o.abs().max()))


def test_recovering_rows_minimise_their_objective(model):
    layers = text_layers(model)
    key = layers[0].reads
    readers = [layer.weight for layer in layers if layer.reads == key]
    own, _, _ = rows_of(model, key)
    generator = torch.Generator().manual_seed(0)
    u, v = (
        0.3 * torch.randn(s, dtype=torch.float64, generator=generator) for s in ((own.shape[1], 2), (2, own.shape[1]))
    )
    found = closed_form.recovering_rows(own, sum(w.mT @ w for w in readers), u, v, 0.03).requires_grad_()
    edited = [w + w @ u @ v for w in readers]
    total = sum((found @ e.mT - own @ w.mT).square().sum() for e, w in zip(edited, readers, strict=True))
    (gradient,) = torch.autograd.grad(total + 0.03 * found.square().sum(), found)
    assert float(gradient.abs().max()) < 1e-9 * float(own.abs().max()) * float(readers[0].square().sum())


def test_each_round_leaves_the_concept_harder_to_bring_back(model):
    layers = text_layers(model)
    key = layers[0].reads
    original = [layer.weight for layer in layers if layer.reads == key]
    own, _, _ = rows_of(model, key)

    def recovered(edit):
        """How far the best embedding stays from what the concept did, as a fraction."""
        changes = changed(model, edit)
        edited = [layer.weight + changes[layer.key] for layer in layers if layer.reads == key]
        best = dense_attack(edited, original, own, 1e-3)
        missed = sum((best @ e.mT - own @ w.mT).square().sum() for e, w in zip(edited, original, strict=True))
        return float(missed / sum((own @ w.mT).square().sum() for w in original))

    options = {**OPTIONS, "attack_lam": 1e-3}
    by_rounds = [recovered(UCE(**OPTIONS).fit(model, CAT))]
    by_rounds += [recovered(RECE(rounds=n, **options).fit(model, CAT)) for n in (1, 2)]
    assert by_rounds[0] < by_rounds[1] < by_rounds[2]
