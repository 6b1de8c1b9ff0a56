"""Closed forms on tables of classes, and which weights a class enters through."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel

from sublimate.erasure.methods.mace_fusion import MACEFusion
from sublimate.erasure.methods.speed import SPEED
from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.text_layers import text_layers
from sublimate.erasure.token_rows import as_rows, concept_rows
from sublimate.erasure.weights import select
from sublimate.pipelines.model import open_model

FAMILIES = {"tiny_dit": ("cat", "dog", "van gogh"), "tiny_edm_classes": ("0", "1", "6")}


@pytest.fixture(params=FAMILIES)
def model(request):
    return open_model(request.getfixturevalue(request.param))


def words(model):
    return FAMILIES["tiny_dit" if model.null_condition() else "tiny_edm_classes"]


@torch.no_grad()
def predicted(model, prompts):
    x_t = torch.randn((1, *model.latent_shape), generator=torch.Generator().manual_seed(0))
    return model.denoiser(x_t.expand(len(prompts), -1, -1, -1), model.schedule.t_max, model.encode_prompts(prompts))


def test_a_class_is_its_one_hot_row(model):
    cat, dog, _ = words(model)
    rows = as_rows(model, model.encode_prompts([dog, cat]))["text"]
    assert rows.dtype == torch.float64
    assert rows.argmax(1).tolist() == [1, 0] and rows.sum() == 2
    found = concept_rows(model, [Concept(cat, dog)], ["{}"], "tail", anchored=True)
    assert torch.equal(found["text"].own, rows[1:]) and torch.equal(found["text"].anchors, rows[:1])
    for layer in text_layers(model):
        # The layer's product with the row is what the network looks up.
        looked_up = model.parameters()[layer.key][0].double()
        torch.testing.assert_close(rows[1] @ layer.weight.mT, looked_up, atol=0, rtol=0)


@pytest.mark.parametrize("preserve", [(), ("van gogh",)])
def test_uce_without_a_ridge_makes_the_class_its_anchor_and_touches_no_other(model, preserve):
    cat, dog, gogh = words(model)
    before, tables = predicted(model, [dog, dog, gogh]).output, {k: p.clone() for k, p in model.parameters().items()}
    edit = UCE(lam=1e-9).fit(model, Request(Concept(cat, dog), preserve=[gogh] if preserve else []))
    assert {key: rank for key, rank in edit.shapes().items()}.keys() == {layer.key for layer in text_layers(model)}
    with edit.applied(model):
        torch.testing.assert_close(predicted(model, [cat, dog, gogh]).output, before, atol=1e-5, rtol=1e-5)
        for key, table in model.parameters().items():
            moved = (table != tables[key]).any(-1) if table.ndim > 1 else (table != tables[key])
            assert not moved.any() or (key in edit.shapes() and moved.nonzero().flatten().tolist() == [0])


def test_a_ridge_stops_between_the_class_and_its_anchor(model):
    # One-hot rows: (W0 g + lam W0 c) / (1 + lam).
    cat, dog, _ = words(model)
    key = text_layers(model)[0].key
    own, anchor = (model.parameters()[key][i].clone() for i in (0, 1))
    with UCE(lam=0.5).fit(model, Request(Concept(cat, dog))).applied(model):
        torch.testing.assert_close(model.parameters()[key][0], (anchor + 0.5 * own) / 1.5, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("eraser", ["mace_fusion", "speed"])
def test_other_closed_forms_bring_the_class_to_its_anchor(tiny_dit, tmp_path, eraser):
    model = open_model(tiny_dit)
    (tmp_path / "prior.txt").write_text("red\n7\n")
    eraser = {
        "mace_fusion": MACEFusion(lam=0.01, prior=tmp_path / "prior.txt"),
        "speed": SPEED(layers="all", augmentations=0, lam=0.01),
    }[eraser]
    target, before = (predicted(model, [word]).output for word in ("dog", "cat"))
    other = predicted(model, ["van gogh"]).output
    with eraser.fit(model, Request(Concept("cat", "dog"), preserve=["van gogh", "seven"])).applied(model):
        left = (predicted(model, ["cat"]).output - target).norm() / (before - target).norm()
        assert left < 0.1
        torch.testing.assert_close(predicted(model, ["van gogh"]).output, other, atol=1e-6, rtol=0)


def test_without_an_anchor_a_class_becomes_none(tiny_dit, tiny_edm_classes):
    model = open_model(tiny_dit)
    none = predicted(model, [""]).output
    with UCE(lam=1e-9).fit(model, Request("cat")).applied(model):
        torch.testing.assert_close(predicted(model, ["cat"]).output, none, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no class for no class"):
        UCE().fit(open_model(tiny_edm_classes), Request("0"))


def test_what_needs_a_null_condition_says_so(tiny_edm_classes):
    model = open_model(tiny_edm_classes)
    with pytest.raises(ValueError, match="has no null condition, which speed holds: use uce"):
        SPEED(layers="all").fit(model, Request(Concept("0", "1"), preserve=["2"]))


def test_rules_of_networks_with_classes():
    dit = DiTTransformer2DModel(
        sample_size=4, num_layers=2, attention_head_dim=4, num_attention_heads=2, num_embeds_ada_norm=3
    )
    names = {name for name, _ in dit.named_parameters()}
    tables = {name for name in names if name.endswith("embedding_table.weight")}
    assert select(dit, "x-strict") == tables and len(tables) == 2
    assert select(dit, "x") == tables | {name for name in names if ".norm1.linear." in name}
    assert select(dit, "self") == {name for name in names if ".attn1." in name}
    left_out = {n for n in names if ".norm1." in n or n.startswith("proj_out_")}
    assert names - select(dit, "u") == left_out
    with pytest.raises(ValueError, match="no weights of the rule 'encoder'"):
        select(dit, "encoder")

    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(sample_size=8, num_class_embeds=3, **blocks, **kinds)
    names = {name for name, _ in unet.named_parameters()}
    assert select(unet, "x-strict") == {"class_embedding.weight"}
    assert select(unet, "x") == {n for n in names if n.startswith("class_embedding.") or ".time_emb_proj." in n}
    assert select(unet, "self") == {n for n in names if ".attentions." in n and ".to_" in n}
    left_out = {n for n in names if n.startswith(("conv_out.", "conv_norm_out.", "time_embedding."))}
    assert names - select(unet, "u") == left_out | select(unet, "x")
    assert "conv_in.weight" in select(unet, "encoder")
