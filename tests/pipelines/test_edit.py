"""Edits: what they touch, that removal restores every bit, and that files, LoRAs and folders do the same."""

import contextlib
import itertools
import json

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from sublimate.erasure.methods.receler import Receler
from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.edit import Edit, beside
from sublimate.pipelines.edit_stack import stack_of
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model

K = "unet/mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
V = "unet/mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
CONV = "unet/conv_in.weight"
BIAS = "unet/conv_in.bias"


@pytest.fixture
def model(tiny_sd):
    return open_model(tiny_sd)


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(model):
    """Every parameter's bytes."""
    return {key: p.detach().numpy().tobytes() for key, p in model.parameters().items()}


def made_for(model, values=(), low_rank=(), seed=0):
    """An edit of the model: new values for some keys, a change of rank 2 for others."""
    shapes = {key: p.shape for key, p in model.parameters().items()}
    factors = {k: (normal((shapes[k][0], 2), seed), normal((2, shapes[k][1]), seed + 1)) for k in low_rank}
    base = {"source": model.source, "content_hash": model.content_hash()}
    return Edit({k: normal(shapes[k], seed) for k in values}, factors, {"base": base, "seed": seed})


def weight(model, key):
    return model.parameters()[key].detach().clone()


def test_an_edit_touches_the_keys_it_names_and_no_others(model):
    before = bits(model)
    edit = made_for(model, [CONV, BIAS], [K])
    original = weight(model, K)
    edit.apply(model)
    after = bits(model)
    assert {key for key in before if before[key] != after[key]} == {CONV, BIAS, K} == set(edit.shapes())
    assert torch.equal(weight(model, CONV), edit.values[CONV])
    b, a = edit.low_rank[K]
    torch.testing.assert_close(weight(model, K), original + b @ a)
    assert model.denoiser.network.conv_in.weight is model.parameters()[CONV]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_removal_in_any_order_restores_every_bit(tiny_sd, dtype):
    model = open_model(tiny_sd, dtype=dtype)
    before = bits(model)
    edits = [made_for(model, [CONV], [K, V], 0), made_for(model, [K], [V], 10), made_for(model, [BIAS], [K, V], 20)]
    alone = {}
    for kept in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in range(4)):
        with contextlib.ExitStack() as stack:
            for i in kept:
                stack.enter_context(edits[i].applied(model))
            alone[kept] = bits(model)
    assert alone[()] == before and len(set(map(str, alone.values()))) == 8
    for order in itertools.permutations(range(3)):
        for edit in edits:
            edit.apply(model)
        for n, removed in enumerate(order, 1):
            edits[removed].remove(model)
            assert bits(model) == alone[tuple(sorted(order[n:]))]
    assert bits(model) == before
    assert stack_of(model) is None


def test_later_values_win_and_low_rank_changes_add(model):
    first, second, third = made_for(model, [], [K], 0), made_for(model, [K], [], 10), made_for(model, [], [K], 20)
    original = weight(model, K).double()
    delta = [e.low_rank[K][0].double() @ e.low_rank[K][1].double() for e in (first, third)]
    first.apply(model)
    third.apply(model)
    assert torch.equal(weight(model, K), (original + delta[0] + delta[1]).float())
    third.remove(model)
    second.apply(model)
    assert torch.equal(weight(model, K), second.values[K])
    third.apply(model)
    assert torch.equal(weight(model, K), (second.values[K].double() + delta[1]).float())


def test_a_context_carries_the_edit_and_survives_errors(model):
    before, edit = bits(model), made_for(model, [CONV], [K])
    with edit.applied(model) as same:
        assert same is model and bits(model) != before
    assert bits(model) == before
    with pytest.raises(RuntimeError, match="inside"), edit.applied(model):
        raise RuntimeError("inside")
    assert bits(model) == before


def test_training_between_edits_is_the_new_pristine_state(model):
    for others in ([], [made_for(model, [BIAS])]):
        edit = made_for(model, [CONV])
        edit.apply(model)
        for other in others:
            other.apply(model, allow_other_base=True)
        edit.remove(model)
        with torch.no_grad():
            model.parameters()[CONV].add_(1)
        before = bits(model)
        with made_for(model, [CONV]).applied(model):
            assert bits(model) != before
        assert bits(model) == before


def test_text_models_with_and_without_a_wrapper_are_the_same(tiny_sd):
    """Some releases of transformers call every parameter of a text model text_model.<name>."""
    model, plain = open_model(tiny_sd), "text_encoder/encoder.layers.0.self_attn.q_proj.weight"
    wrapped = plain.replace("/", "/text_model.", 1)
    assert plain in model.parameters()
    before, ours = bits(model), made_for(model, low_rank=[plain])
    theirs = Edit({}, {wrapped: ours.low_rank[plain]}, ours.provenance)
    with ours.applied(model):
        expected = bits(model)
    assert expected != before
    with theirs.applied(model):
        assert bits(model) == expected
        with pytest.raises(ValueError, match="are one parameter, in edits made with different releases"):
            ours.apply(model)
        assert bits(model) == expected
    assert bits(model) == before
    with pytest.raises(ValueError, match="are one parameter"):
        Edit.compose([ours, theirs]).apply(model)
    assert theirs.to_lora(model).keys() == ours.to_lora(model).keys()


def test_applying_twice_and_removing_nothing_are_refused(model):
    edit, other = made_for(model, [CONV]), made_for(model, [CONV])
    with pytest.raises(ValueError, match="nothing to remove"):
        edit.remove(model)
    edit.apply(model)
    with pytest.raises(ValueError, match="already applied"):
        edit.apply(model)
    with pytest.raises(ValueError, match="nothing to remove"):
        other.remove(model)


def test_what_does_not_fit_is_refused_before_anything_is_touched(model, tiny_unconditional):
    before, base = bits(model), {"base": {"content_hash": model.content_hash()}}
    good = torch.zeros(model.parameters()[CONV].shape)
    for key, value, message in (
        ("unet/nowhere.weight", torch.zeros(2), "has no parameter unet/nowhere.weight"),
        ("transformer/conv_in.weight", torch.zeros(2), "has no parameter transformer/"),
        ("unet/conv_in", torch.zeros(2), "has no parameter"),
        (BIAS, torch.zeros(3), r"shape \(8,\) in the model .* and \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Edit({CONV: good, key: value}, {}, base).apply(model)
        assert bits(model) == before and stack_of(model) is None


@pytest.mark.slow
def test_another_base_is_refused_by_name_unless_allowed(model, tiny_sd_v):
    other = open_model(tiny_sd_v)
    with torch.no_grad():
        other.pipeline.vae.decoder.conv_in.bias.add_(1)
    edit, before = made_for(model, [CONV]), bits(other)
    with pytest.raises(ValueError, match=rf"made for {model.source} .*the model is {other.source} .*allow_other_base"):
        edit.apply(other)
    half = open_model(model.source, dtype=torch.float16)
    with pytest.raises(ValueError, match="not in float32"):
        edit.apply(half)
    with pytest.raises(ValueError, match=r"an unnamed model \(no hash\)"):
        Edit(edit.values).apply(other)
    assert bits(other) == before and stack_of(other) is None
    with edit.applied(other, allow_other_base=True):
        assert torch.equal(weight(other, CONV), edit.values[CONV])
    assert bits(other) == before


@pytest.mark.slow
def test_an_edit_of_an_edited_model_applies_on_top_of_it_or_of_the_base(model):
    first = made_for(model, [CONV], seed=0)
    first.apply(model)
    second = made_for(model, [BIAS], seed=10)
    second.apply(model)
    made_for(open_model(model.source), [], [K]).apply(model)
    first.remove(model)
    with pytest.raises(ValueError, match="made for"):
        made_for(model, [CONV], seed=3).apply(open_model(model.source))


def test_composed_edits_do_what_the_stack_does(model, tiny_sd):
    edits = [made_for(model, [CONV], [K, V], 0), made_for(model, [V], [K], 10), made_for(model, [], [V, K], 20)]
    composed = Edit.compose(edits)
    composed.apply(model)
    stacked = open_model(tiny_sd)
    for edit in edits:
        edit.apply(stacked)
    for key in (CONV, K, V):
        torch.testing.assert_close(weight(model, key), weight(stacked, key), rtol=1e-6, atol=1e-6)
    assert set(composed.values) == {CONV, V} and len(composed.low_rank[K][1]) == 6
    assert [part["seed"] for part in composed.provenance["composed"]] == [0, 10, 20]
    with pytest.raises(ValueError, match="nothing to compose"):
        Edit.compose([])
    with pytest.raises(ValueError, match="different bases"):
        Edit.compose([edits[0], Edit(edits[1].values, {}, {"base": {"source": "b", "content_hash": "c"}})])


def test_a_file_is_the_edit(model, tmp_path):
    edit = made_for(model, [CONV], [K])
    path = edit.save(tmp_path / "folder" / "edit.safetensors")
    read = Edit.load(path)
    assert read.provenance == edit.provenance
    assert read.values.keys() == {CONV} and read.low_rank.keys() == {K}
    assert torch.equal(read.values[CONV], edit.values[CONV])
    assert all(torch.equal(x, y) for x, y in zip(read.low_rank[K], edit.low_rank[K], strict=True))
    assert [p.name for p in path.parent.iterdir()] == ["edit.safetensors"]


def test_a_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = made_for(model, [CONV]).save(tmp_path / "edit.safetensors")
    before = path.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("sublimate.pipelines.edit.save_file", full)
    with pytest.raises(OSError, match="No space"):
        made_for(model, [BIAS]).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_files_that_are_no_edits_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "edit.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "disguised.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "tensors.safetensors")
    for name, message in (
        ("edit.pt", "is a pickle.*weights_only=True"),
        ("disguised.safetensors", "damaged or not a safetensors file"),
        ("tensors.safetensors", "is not an edit"),
    ):
        with pytest.raises(ValueError, match=message):
            Edit.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no edit file"):
        Edit.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match=r"\.safetensors file"):
        Edit({CONV: torch.zeros(1)}).save(tmp_path / "edit.pt")


def test_senseless_edits_are_refused():
    zeros, factors = torch.zeros(2, 2), (torch.zeros(2, 1), torch.zeros(1, 2))
    for values, low_rank, message in (
        ({}, {}, "at least one"),
        ({K: zeros}, {K: factors}, "both a new value and a low-rank"),
        ({}, {K: (zeros, torch.zeros(1, 2))}, "do not multiply"),
        ({"conv_in.weight": zeros}, {}, "component/parameter"),
        ({K: zeros / 0}, {}, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            Edit(values, low_rank)
    with pytest.raises(TypeError, match="JSON"):
        Edit({K: zeros}, {}, {"seed": zeros})


def test_an_edit_keeps_its_own_float32_copy():
    for dtype in (torch.float32, torch.float64):
        value = torch.ones(2, dtype=dtype)
        edit = Edit({K: value}, provenance={"list": (1, 2)})
        value.zero_()
        assert edit.values[K].dtype == torch.float32 and edit.values[K].tolist() == [1, 1]
    assert edit.provenance == json.loads(json.dumps(edit.provenance)) == {"list": [1, 2]}


def image(pipeline):
    generator = torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent", "generator": generator}
    return pipeline("a cat", **arguments).images


@pytest.mark.slow
def test_a_lora_is_the_edit(model, tmp_path):
    edit = made_for(model, [], [K, V])
    b, a = edit.low_rank[V]
    edit = Edit({}, {K: edit.low_rank[K], V: (0.3 * b[:, :1], 0.3 * a[:1])}, edit.provenance)
    plain = image(model.pipeline)
    save_file(edit.to_lora(model), tmp_path / "pytorch_lora_weights.safetensors")
    with edit.applied(model):
        expected = image(model.pipeline)
    assert (expected - plain).abs().max() > 1e-3
    pipeline = StableDiffusionPipeline.from_pretrained(model.source)
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(image(pipeline), expected, rtol=0, atol=1e-5)


def test_only_exact_loras_are_made(model):
    with pytest.raises(ValueError, match=f"{CONV} is not low-rank"):
        made_for(model, [CONV], [K]).to_lora(model)
    with pytest.raises(ValueError, match="rank 2, more than 1"):
        made_for(model, [], [K]).to_lora(model, max_rank=1)
    embedding = "text_encoder/embeddings.token_embedding.weight"
    embedding = embedding if embedding in model.parameters() else embedding.replace("/", "/text_model.")
    with pytest.raises(ValueError, match="not the weight of a linear layer"):
        made_for(model, [], [embedding]).to_lora(model)


def test_no_lora_is_made_where_the_stock_pipeline_loads_none(tiny_pixart):
    model = open_model(tiny_pixart)
    edit = UCE().fit(model, Request(erase=(Concept("cat", anchor="dog"),)))
    with pytest.raises(ValueError, match="a PixArtAlphaPipeline loads from a LoRA: fold"):
        edit.to_lora(model)


def test_the_files_keys_are_the_parameters_names(model, tmp_path):
    path = made_for(model, [CONV], [K]).save(tmp_path / "edit.safetensors")
    assert load_file(path).keys() == {CONV, f"{K}.lora_A", f"{K}.lora_B"}


@pytest.mark.slow
def test_a_folded_model_opens_in_stock_diffusers(model, tmp_path):
    edit, before = made_for(model, [CONV], [K]), bits(model)
    with edit.applied(model):
        expected, drawn = bits(model), image(model.pipeline)
        edit.fold(model, tmp_path / "carried")
        assert bits(model) == expected
    folder = edit.fold(model, tmp_path / "folded")
    assert bits(model) == before
    index = json.loads((folder / "model_index.json").read_text())
    libraries = {value[0] for value in index.values() if isinstance(value, list)}
    assert libraries == {"diffusers", "transformers", None}
    assert torch.equal(image(DiffusionPipeline.from_pretrained(folder)), drawn)
    for name in ("folded", "carried"):
        assert bits(open_model(tmp_path / name)) == expected
    record = json.loads((folder / "sublimate.json").read_text())["provenance"]
    assert record["base"] == edit.provenance["base"] and record["seed"] == edit.provenance["seed"]
    assert "edits" not in record
    other = made_for(model, [K])
    with other.applied(model):
        edit.fold(model, tmp_path / "both")
    record = json.loads((tmp_path / "both" / "sublimate.json").read_text())["provenance"]
    assert record["edits"] == [json.loads(json.dumps(made.provenance)) for made in (other, edit)]


@pytest.mark.slow
@pytest.mark.parametrize("attached", [False, True])
def test_a_model_beside_another_shares_all_that_its_edit_leaves_alone(model, tiny_sd, attached):
    request = Request(Concept("cat", anchor="" if attached else "dog"))
    options = {"max_train_steps": 2, "sampling_steps": 2, "train_batch_size": 1, "learning_rate": 1e-2}
    edit = (Receler(**options) if attached else UCE()).fit(model, request)
    before, expected = bits(model), open_model(tiny_sd)
    edit.apply(expected)
    second = beside(model, edit)
    own = model.parameters()
    moved = {key for key, p in second.parameters().items() if p.data_ptr() != own[key].data_ptr()}
    assert moved == set(edit.shapes()) and second.content_hash() == expected.content_hash()
    drawn = [generate(which, ["a cat"], steps=2) for which in (model, second, expected)]
    assert torch.equal(drawn[1], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    edit.remove(second)
    assert bits(model) == before == bits(second)
    with edit.applied(model), pytest.raises(ValueError, match="carries edits"):
        beside(model, edit)
