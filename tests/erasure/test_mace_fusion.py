"""MACE's closed forms: each concept's change and their fusion against dense solves, and a thousand at once."""

import itertools
import string

import pytest
import torch

from sublimate.erasure import closed_form
from sublimate.erasure.methods.mace_fusion import MACEFusion, MACEFusionConfig, fused, held_moments, refined
from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.token_rows import Rows, concept_rows
from sublimate.pipelines.model import open_model

TEMPLATES = ("{}", "a photo of {} in red")
SEVERAL = Request([Concept("cat", "dog"), Concept("van gogh", "")], preserve=["seven", "red"])


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return open_model(tiny_sd)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def least_squares(rows, values, held, preserve, lam, w0):
    """argmin_W sum |W c - v|^2 + preserve sum |W c_k - W0 c_k|^2 + lam |W - W0|^2 as one stacked problem."""
    stacked = torch.cat([rows, preserve**0.5 * held, lam**0.5 * torch.eye(rows.shape[1]).double()])
    aims = torch.cat([values, preserve**0.5 * held @ w0.T, lam**0.5 * w0.T])
    return torch.linalg.lstsq(stacked, aims).solution.T


def test_every_layer_is_the_fusion_of_the_concepts_own_solutions(sd):
    options = {"templates": TEMPLATES, "refine_preserve": 0.4, "fuse_preserve": 0.7, "lam": 0.2}
    edit = MACEFusion(**options).fit(sd, SEVERAL)
    found = [concept_rows(sd, [c], TEMPLATES, "tail", anchored=True)["text"] for c in SEVERAL.erase]
    held = concept_rows(sd, SEVERAL.preserve, TEMPLATES, "tail", anchored=False)["text"].own
    assert set(edit.low_rank) == {f"unet/{p.module_name}.weight" for p in sd.text_entry_points()}
    for key, (b, a) in edit.low_rank.items():
        w0 = sd.parameters()[key].double()
        own = [least_squares(rows.own, rows.anchors @ w0.T, held, 0.4, 0.2, w0) for rows in found]
        values = torch.cat([rows.own @ w.T for rows, w in zip(found, own, strict=True)])
        expected = least_squares(torch.cat([rows.own for rows in found]), values, held, 0.7, 0.2, w0)
        torch.testing.assert_close(w0 + b.double() @ a.double(), expected, rtol=0, atol=2e-6)
        assert (expected - w0).abs().max() > 1e-2


@pytest.mark.parametrize("preserve", [0.0, 0.3])
def test_refined_rows_are_what_the_concepts_own_layer_reads(preserve):
    own, anchors, held, w0 = normal(7, 12), normal(7, 12, seed=1), normal(20, 12, seed=2), normal(5, 12, seed=3)
    moment = closed_form.second_moment(held, torch.ones(20)) if preserve else None
    rows = refined(Rows(own, anchors), preserve, moment, 0.2)
    expected = own @ least_squares(own, anchors @ w0.T, held, preserve, 0.2, w0).T
    torch.testing.assert_close(rows @ w0.T, expected, rtol=0, atol=1e-11)


@pytest.mark.slow
def test_a_thousand_concepts_go_through_one_solve_to_rounding(monkeypatch):
    factored = []
    real = closed_form._factored
    monkeypatch.setattr(closed_form, "_factored", lambda m, lam: factored.append(m) or real(m, lam))
    d, cc, moved = 96, None, None
    # Nearly collinear, as the rows of a text encoder are.
    common, w0 = 9 * normal(1, d, seed=1), normal(5, d, seed=2)
    rows, aims, ones = [], [], torch.ones(6)
    for seed in range(1000):
        c = common + 0.4 * normal(6, d, seed=seed)
        change = 0.3 * normal(6, d, seed=2000 + seed)
        cc, moved = closed_form.second_moment(c, ones, cc), closed_form.cross_moment(change, c, ones, moved)
        rows.append(c)
        aims.append((c + change) @ w0.T)
    u, v = fused(cc, moved, 1e-2)
    assert len(factored) == 1
    expected = least_squares(torch.cat(rows), torch.cat(aims), rows[0][:0], 0.0, 1e-2, w0)
    condition = float(torch.linalg.cond(factored[0] + 1e-2 * torch.eye(d).double()))
    assert condition > 1e4
    error = (w0 + w0 @ u @ v - expected).norm() / expected.norm()
    assert error < 10 * condition * 2.2e-16


@pytest.mark.slow
def test_a_thousand_concepts_of_a_model_are_erased_together(sd):
    names = ["".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=2)]
    names += [f"{name}x" for name in names]
    edit = MACEFusion(tokens="last").fit(sd, Request([Concept(name, "dog") for name in names[:1000]], ["red"]))
    assert all(len(a) <= a.shape[1] for _, a in edit.low_rank.values())
    point = sd.text_entry_points()[0]
    layer = sd.denoiser.network.get_submodule(point.module_name)
    rows = concept_rows(sd, [Concept(names[3], "dog"), Concept(names[999], "dog")], ["{}"], "last", anchored=True)
    own, anchors = rows["text"].own.float(), rows["text"].anchors.float()
    before, wanted = layer(own), layer(anchors)
    with edit.applied(sd):
        after = layer(own)
    assert (after - wanted).norm() < 0.5 * (before - wanted).norm()


def test_a_lone_concept_that_nothing_holds_is_its_own_change_and_that_is_uce(sd):
    request = Request(Concept("cat", "dog"))
    edit = MACEFusion(tokens="last", fuse_preserve=0, lam=1e-7).fit(sd, request)
    plain = UCE(tokens="last", lam=1e-7).fit(sd, request)
    for key, (b, a) in plain.low_rank.items():
        torch.testing.assert_close(edit.low_rank[key][0] @ edit.low_rank[key][1], b @ a, rtol=1e-4, atol=1e-5)
    assert max(len(a) for _, a in edit.low_rank.values()) == 1


def test_the_fusion_disturbs_concepts_less_than_the_sum_of_their_changes(sd):
    # Changes of similar concepts add up to more than either asks for.
    request = Request([Concept(name, "dog") for name in ("cat", "painting", "photo", "style")])
    found = [concept_rows(sd, [c], ["{}"], "last", anchored=True)["text"] for c in request.erase]
    own = [refined(rows, 0.0, None, 1e-3) - rows.own for rows in found]
    solutions = [torch.linalg.lstsq(rows.own, change).solution for rows, change in zip(found, own, strict=True)]
    summed = torch.stack(solutions).sum(0)
    edit = MACEFusion(tokens="last", lam=1e-3).fit(sd, request)
    key, (b, a) = next(iter(edit.low_rank.items()))
    w0 = sd.parameters()[key].double()
    for rows, change in zip(found, own, strict=True):
        wanted = change @ w0.T
        apart = (rows.own @ summed @ w0.T - wanted).norm()
        assert (rows.own @ (b.double() @ a.double()).T - wanted).norm() < 0.3 * apart


def test_held_rows_are_summed_in_parts_and_stay(sd, tmp_path):
    prompts = [
        f"a {x} of the {y}" for x, y in itertools.product(("photo", "painting", "style"), ("dog", "red", "van"))
    ]
    prompts = prompts * 8  # more than one part
    (tmp_path / "prior.txt").write_text("\n".join(prompts))
    config = MACEFusionConfig(prior=tmp_path / "prior.txt")
    moment = held_moments(sd, Request("cat", preserve=["seven"]), config)["text"]
    with torch.no_grad():
        rows = sd.encode_prompts(prompts)["text"].flatten(0, 1).double()
    seven = concept_rows(sd, [Concept("seven")], ["{}"], "tail", anchored=False)["text"].own
    torch.testing.assert_close(moment, rows.T @ rows + seven.T @ seven, rtol=1e-6, atol=1e-4)
    request, moved = Request(Concept("cat", "dog")), {}
    for scale in (0.0, 1.0, 1e4):
        edit = MACEFusion(tokens="last", prior=tmp_path / "prior.txt", fuse_preserve=scale, lam=1e-3).fit(sd, request)
        b, a = next(iter(edit.low_rank.values()))
        moved[scale] = float((rows @ (b @ a).double().T).norm())
    assert moved[0.0] > 2 * moved[1.0] > 20 * moved[1e4] > 0


def test_padding_that_is_masked_is_not_held(tiny_pixart, tmp_path):
    model, request = open_model(tiny_pixart), Request(Concept("cat", "dog"))
    (tmp_path / "prior.txt").write_text("a painting of the red\nthe dog")
    moments = held_moments(model, request, MACEFusionConfig(prior=tmp_path / "prior.txt"))
    told = model.encode_prompts(["a painting of the red", "the dog"])
    own = told["text"][told["text.mask"].bool()].double()
    assert moments.keys() == {"text"} and 0 < len(own) < told["text"].shape[:2].numel()
    torch.testing.assert_close(moments["text"], own.T @ own)


def test_what_cannot_be_done_is_refused(sd, tmp_path, tiny_unconditional):
    with pytest.raises(ValueError, match="not unique"):
        MACEFusion(lam=0, tokens="last").fit(sd, SEVERAL)
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        MACEFusion(prior=tmp_path / "none.txt").fit(sd, SEVERAL)
    with pytest.raises(ValueError, match="No text enters"):
        MACEFusion().fit(open_model(tiny_unconditional), SEVERAL)
