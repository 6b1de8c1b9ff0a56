"""UCE on real pipelines: the minimiser it promises, what its edit does to the network, and what it refuses."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from sublimate.diffusion.conditions import Condition
from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.token_rows import aligned, concept_rows, read_rows
from sublimate.pipelines.model import open_model
from sublimate.pipelines.tokens import TokenSpan

CAT = Request(Concept("cat", "dog"), preserve=["seven", "red"])
TEMPLATES = ("{}", "a photo of {} in red")


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return open_model(tiny_sd)


@pytest.fixture(scope="module")
def sd3(tiny_sd3):
    return open_model(tiny_sd3)


@pytest.fixture(scope="module")
def flux(tiny_flux):
    return open_model(tiny_flux)


def bits(model):
    return {key: p.detach().numpy().tobytes() for key, p in model.parameters().items()}


def span(start, stop, last=16):
    return TokenSpan("text", start, stop, stop, last)


@pytest.mark.parametrize(
    "concept, anchor, tokens, first, here, there",
    [
        # One token for one: each row for its like, the padding included.
        (span(4, 5, 8), span(4, 5, 8), "tail", 0, [4, 5, 6, 7], [4, 5, 6, 7]),
        # Last tokens correspond, and the end token that follows them.
        (span(4, 6, 8), span(4, 5, 8), "tail", 0, [4, 5, 6, 7], [4, 4, 5, 6]),
        (span(4, 7, 8), span(4, 6, 8), "tail", 0, [4, 5, 6, 7], [4, 4, 5, 6]),
        # A longer anchor runs out of padding first.
        (span(4, 5, 8), span(4, 7, 8), "tail", 0, [4, 5, 6, 7], [6, 7, 7, 7]),
        # Nothing is the row before.
        (span(1, 3, 5), span(1, 1, 5), "tail", 0, [1, 2, 3, 4], [0, 0, 1, 2]),
        # T5 has no start token: nothing is then its first row, and end tokens still meet.
        (span(8, 10, 12), span(8, 8, 12), "tail", 8, [8, 9, 10, 11], [8, 8, 8, 9]),
        (span(4, 6, 8), span(4, 5, 8), "last", 0, [5], [4]),
        (span(1, 3, 5), span(1, 1, 5), "last", 0, [2], [0]),
    ],
)
def test_alignment(concept, anchor, tokens, first, here, there):
    rows = aligned(concept, anchor, tokens, first)
    assert [r.tolist() for r in rows] == [here, there]


def test_a_causal_encoder_reads_no_further_than_it_is_asked_to(sd, sd3):
    prompts = ["a red cat", "van gogh", ""]
    whole, start = sd.encode_prompts(prompts)["text"], sd.encode_prefixes(prompts, 3)["text"]
    assert whole.shape[1] == 16 and start.shape[1] == 3
    torch.testing.assert_close(start, whole[:, :3], rtol=1e-5, atol=1e-6)
    # T5 is not causal: it reads everything.
    assert sd3.encode_prefixes(prompts, 3)["text"].shape == sd3.encode_prompts(prompts)["text"].shape


@pytest.mark.parametrize("tokens, read", [("last", 4 * 4), ("tail", 4 * 16)])
def test_rows_are_encoded_once_and_without_padding_where_it_is_not_asked_for(sd, monkeypatch, tokens, read):
    concepts = [Concept("van gogh", "red"), Concept("cat", "red"), Concept("a seven dog", "red")]
    counted = []
    hook = sd.pipeline.text_encoder.register_forward_hook(lambda *_: counted.append(_[2].last_hidden_state.shape))
    monkeypatch.setattr("sublimate.erasure.token_rows._BATCH", 2)
    found = concept_rows(sd, concepts, ["{}"], tokens, anchored=True)["text"]
    hook.remove()
    assert sum(batch * length for batch, length, _ in counted) == read
    monkeypatch.setattr("sublimate.pipelines.backbones.stable_diffusion.StableDiffusion.encode_prefixes", padded)
    expected = concept_rows(sd, concepts, ["{}"], tokens, anchored=True)["text"]
    torch.testing.assert_close(found.own, expected.own, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.anchors, expected.anchors, rtol=1e-5, atol=1e-6)


def padded(backbone, pipe, prompts, rows):
    """Every prompt to the tokenizer's limit, whatever is read of it."""
    ids = pipe.tokenizer(list(prompts), padding="max_length", max_length=16, return_tensors="pt").input_ids
    return Condition({"text": pipe.text_encoder(ids).last_hidden_state})


def test_rows_are_those_of_the_words(sd, sd3):
    concept = Concept("van gogh", "red", prompts=("the style of Van Gogh",))
    rows = concept_rows(sd, [concept], ["a painting in {} style"], "last", anchored=True)["text"]
    text = sd.encode_prompts(["a painting in van gogh style", "the style of van gogh"])["text"].double()
    anchors = sd.encode_prompts(["a painting in red style", "the style of red"])["text"].double()
    torch.testing.assert_close(rows.own, text[[0, 1], [5, 5]], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(rows.anchors, anchors[[0, 1], [4, 4]], rtol=1e-5, atol=2e-6)
    rows = concept_rows(sd3, [concept], ["{}"], "tail", anchored=False)
    # 15 of CLIP's 16 rows from "van" on, all of T5's 256; then the prompt's 12 and 253.
    assert rows["text"].own.shape == ((15 + 256) + (12 + 253), 32)
    assert torch.equal(rows["text"].own, rows["text"].anchors)
    assert rows["text.pooled"].own.shape == (2, 32)


def test_an_anchor_that_its_template_has_too_is_the_one_in_the_concepts_place(sd, sd3):
    concept = Concept("seven", "red")
    found = concept_rows(sd, [concept], ["a red {}"], "tail", anchored=True)["text"]
    own, anchors = sd.encode_prompts(["a red seven", "a red red"])["text"].double()
    torch.testing.assert_close(found.own, own[3:], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(found.anchors, anchors[3:], rtol=1e-5, atol=2e-6)
    found = concept_rows(sd3, [concept], ["a red {}"], "last", anchored=True)["text"]
    anchors = sd3.encode_prompts(["a red red"])["text"][0].double()
    torch.testing.assert_close(found.anchors, anchors[[3, 16 + 2]], rtol=1e-5, atol=2e-6)


def test_rows_that_are_read_are_those_of_the_prompts_own_tokens(sd, tiny_pixart):
    told = sd.encode_prompts(["red", "a cat"])
    assert torch.equal(read_rows(sd, told)["text"], told["text"].flatten(0, 1).double())
    model = open_model(tiny_pixart)
    told = model.encode_prompts(["red", "a cat"])
    tokens = told["text.mask"].sum(1).long().tolist()
    found = read_rows(model, told)
    assert found.keys() == {"text"} and tokens[0] < tokens[1] < told["text"].shape[1]
    expected = torch.cat([rows[:count] for rows, count in zip(told["text"], tokens, strict=True)])
    assert torch.equal(found["text"], expected.double())


def test_rows_of_masked_text_end_with_the_prompt(tiny_pixart, tiny_sana):
    for folder, rows in ((tiny_pixart, ([2, 3, 4, 5], [2, 2, 3, 4])), (tiny_sana, ([3, 4, 5], [3, 3, 4]))):
        model = open_model(folder)
        found = concept_rows(model, [Concept("van gogh", "red")], ["a cat {} style"], "tail", anchored=True)
        assert found.keys() == {"text"}  # and not its mask
        text, anchors = model.encode_prompts(["a cat van gogh style", "a cat red style"])["text"].double()
        torch.testing.assert_close(found["text"].own, text[rows[0]], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(found["text"].anchors, anchors[rows[1]], rtol=1e-5, atol=2e-6)


def test_an_empty_anchor_is_the_row_before(sd, sd3):
    gone = Concept("van gogh", "")
    rows = concept_rows(sd, [gone], ["a painting in {} style"], "last", anchored=True)["text"]
    torch.testing.assert_close(
        rows.anchors, sd.encode_prompts(["a painting in style"])["text"][0, 3:4].double(), rtol=1e-5, atol=2e-6
    )
    rows = concept_rows(sd3, [gone], ["{}"], "last", anchored=True)["text"]
    # CLIP's start token, and T5's first row, which is not the row before: that is CLIP's last.
    torch.testing.assert_close(rows.anchors, sd3.encode_prompts([""])["text"][0, [0, 16]].double())


@pytest.mark.parametrize("tokens", ["tail", "last"])
def test_every_layer_is_the_weighted_least_squares_solution(sd, tokens):
    request = Request([Concept("cat", "dog"), Concept("van gogh", "")], preserve=["seven", "red"])
    options = {"tokens": tokens, "templates": TEMPLATES, "erase_scale": 0.7, "preserve_scale": 0.3, "lam": 0.2}
    edit = UCE(**options).fit(sd, request)
    erased = concept_rows(sd, request.erase, TEMPLATES, tokens, anchored=True)["text"]
    kept = concept_rows(sd, request.preserve, TEMPLATES, tokens, anchored=False)["text"].own
    rows = torch.cat([0.7**0.5 * erased.own, 0.3**0.5 * kept, 0.2**0.5 * torch.eye(16)])
    names = {f"unet/{p.module_name}.weight" for p in sd.text_entry_points()}
    assert set(edit.low_rank) == names and not edit.values and len(names) == 8
    for key, (b, a) in edit.low_rank.items():
        w0 = sd.parameters()[key].double()
        values = [0.7**0.5 * erased.anchors @ w0.T, 0.3**0.5 * kept @ w0.T, 0.2**0.5 * w0.T]
        expected = torch.linalg.lstsq(rows, torch.cat(values)).solution.T
        torch.testing.assert_close(w0 + b.double() @ a.double(), expected, rtol=0, atol=2e-6)


def test_the_concept_is_drawn_as_its_anchor(sd):
    x_t = torch.randn(1, *sd.latent_shape, generator=torch.Generator().manual_seed(0))
    cat, dog = (sd.encode_prompts([prompt]) for prompt in ("cat", "dog"))
    with torch.no_grad():
        expected = sd.denoiser(x_t, 500.0, dog).output
        plain = sd.denoiser(x_t, 500.0, cat).output
        with UCE().fit(sd, Request(Concept("cat", "dog"))).applied(sd):
            edited = sd.denoiser(x_t, 500.0, cat).output
    assert (edited - expected).norm() < 0.2 * (plain - expected).norm()


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["tail", "last"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_joint_attention_is_edited_where_text_enters_with_its_bias_once(family, tokens, request):
    model = request.getfixturevalue(family)
    edit = UCE(lam=1e-6, tokens=tokens).fit(model, Request(Concept("cat", "dog")))
    rows = concept_rows(model, [Concept("cat", "dog")], ["{}"], tokens, anchored=True)
    layers = {
        "text": model.denoiser.network.context_embedder,
        "text.pooled": model.denoiser.network.time_text_embed.text_embedder.linear_1,
    }
    with torch.no_grad():
        for key, layer in layers.items():
            assert layer.bias is not None and layer.bias.abs().max() > 1e-3
            own, anchors = rows[key].own.float(), rows[key].anchors.float()
            before, wanted = layer(own), layer(anchors)
            with edit.applied(model):
                after = layer(own)
            assert (wanted - before).abs().max() > 1e-2
            # 271 rows in 32 dimensions cannot all follow exactly.
            bound = 0.3 if (key, tokens) == ("text", "tail") else 1e-4
            assert (after - wanted).norm() < bound * (before - wanted).norm()
    assert all(len(a) <= min(b.shape[0], a.shape[1]) for b, a in edit.low_rank.values())
    assert set(edit.low_rank) == {
        "transformer/context_embedder.weight",
        "transformer/time_text_embed.text_embedder.linear_1.weight",
    }


def test_preserved_rows_stay(sd):
    request = Request(Concept("cat", "dog"), preserve=["red"])
    rows = concept_rows(sd, request.preserve, ["{}"], "last", anchored=False)["text"].own.float()
    point = sd.text_entry_points()[0]
    layer = sd.denoiser.network.get_submodule(point.module_name)
    moved = {}
    for scale in (0.0, 1.0, 1e5):
        before = layer(rows)
        with UCE(tokens="last", preserve_scale=scale, lam=1e-3).fit(sd, request).applied(sd):
            moved[scale] = (layer(rows) - before).norm().item()
    assert moved[0.0] > 10 * moved[1.0] > 0
    assert moved[1e5] < 1e-4 * moved[0.0]


def test_relative_lam_is_lam_times_the_mean_square(sd):
    square = concept_rows(sd, CAT.erase, ["{}"], "tail", anchored=True)["text"].own.square().sum(1).mean().item()
    relative, absolute = UCE(lam_relative=True).fit(sd, CAT), UCE(lam=0.5 * square).fit(sd, CAT)
    for key, (b, a) in relative.low_rank.items():
        torch.testing.assert_close(b @ a, absolute.low_rank[key][0] @ absolute.low_rank[key][1])


def test_fit_leaves_the_model_alone_and_says_where_the_edit_comes_from(sd):
    before = bits(sd)
    edit = UCE(tokens="last").fit(sd, CAT, seed=3)
    assert bits(sd) == before
    assert edit.provenance["base"] == {"source": Path(sd.source).name, "content_hash": sd.content_hash()}
    assert edit.provenance["method"] == "uce" and edit.provenance["paper"] == "2308.14761"
    assert edit.provenance["config"]["tokens"] == "last" and edit.provenance["seed"] == 3
    assert Request.from_dict(edit.provenance["request"]) == CAT
    assert edit.provenance["versions"].keys() == {"sublimate", "torch", "diffusers", "transformers"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_the_edit_is_a_lora(family, tmp_path, request):
    model = request.getfixturevalue(family)
    edit = UCE(tokens="last", templates=TEMPLATES).fit(model, CAT)
    # Two templates, in each one row per tokenizer.
    assert max(len(a) for _, a in edit.low_rank.values()) == {"sd": 2, "sd3": 4, "flux": 2}[family]
    save_file(edit.to_lora(model), tmp_path / "pytorch_lora_weights.safetensors")
    pipeline = DiffusionPipeline.from_pretrained(model.source)

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        # Without guidance, which would multiply the rounding errors.
        call = {"num_inference_steps": 2, "guidance_scale": 1, "height": 16, "width": 16, "output_type": "latent"}
        return pipe("a cat", generator=generator, **call).images

    plain = draw(pipeline)
    with edit.applied(model):
        expected = draw(model.pipeline)
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(pipeline), expected, rtol=0, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3


def test_what_uce_cannot_do_is_refused(sd, tiny_unconditional):
    with pytest.raises(ValueError, match="No text enters"):
        UCE().fit(open_model(tiny_unconditional), CAT)
    with pytest.raises(ValueError, match="uce cannot erase within 'photo' only"):
        UCE().fit(sd, Request("cat", within="photo"))
    with pytest.raises(ValueError, match="does not consult a detector"):
        UCE().fit(sd, CAT, detector=object())
    with pytest.raises(ValueError, match="exactly one"):
        UCE(templates=("a photo",))
    with pytest.raises(TypeError, match="not both"):
        UCE(UCE.Config(), lam=1.0)
    with pytest.raises(ValueError, match="not unique"):
        UCE(tokens="last", lam=0).fit(sd, CAT)
