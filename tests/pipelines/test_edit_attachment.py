"""Attachments of edits: they act while applied, leave no bit behind, travel in the file, not into stock folders."""

import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sublimate.pipelines import attached
from sublimate.pipelines.edit import Edit
from sublimate.pipelines.edit_attachment import EditAttachment, attached_kinds, detached, strip
from sublimate.pipelines.edit_stack import stack_of
from sublimate.pipelines.export import export_lora, export_student, save_model
from sublimate.pipelines.model import open_model
from sublimate.training.data import ModelSource
from sublimate.training.data_config import DataConfig
from sublimate.training.distill import DistillConfig, distill
from sublimate.training.players import PlayerConfig, make_player
from sublimate.training.randomness import SampleRandom
from sublimate.training.sources import make_source

CONV, BIAS = "unet/conv_in.weight", "unet/conv_in.bias"
PROMPTS = ["a red cat", "", "a painting in the style of van gogh"]


@pytest.fixture(autouse=True)
def shifted_kind(monkeypatch):
    """The kind "shifted", which lies with the tests."""
    support = str(Path(__file__).parents[1] / "support" / "attached")
    monkeypatch.setattr(attached, "__path__", [*attached.__path__, support])
    yield
    sys.modules.pop(f"{attached.__name__}.shifted", None)


@pytest.fixture
def model(tiny_sd):
    return open_model(tiny_sd)


def text_layer(model):
    names = (name for name, _ in model.component("text_encoder").named_modules())
    return "text_encoder/" + next(name for name in names if name.endswith("encoder.layers.0"))


def shifted(model, name=None, by=1.0, values=(), seed=0):
    """An edit that shifts a module's outputs, and gives parameters new values."""
    name = text_layer(model) if name is None else name
    width = 16 if name.startswith("text") else 8
    shape = (width,) if name.startswith("text") else (width, 1, 1)
    tensor = by * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    shapes = {key: p.shape for key, p in model.parameters().items()}
    base = {"source": model.source, "content_hash": model.content_hash()}
    attachment = EditAttachment("shifted", {"modules": [name]}, {"by": tensor})
    return Edit({key: torch.ones(shapes[key]) for key in values}, {}, {"base": base}, attachment)


def bits(model):
    return {key: p.detach().numpy().tobytes() for key, p in model.parameters().items()}


@torch.no_grad()
def outputs(model, dtype=torch.float32):
    """Conditions of prompts, and the network's answer to one fixed condition."""
    condition = model.encode_prompts(PROMPTS)
    told = condition.replace(
        text=torch.linspace(-1, 1, condition["text"].numel(), dtype=dtype).view_as(condition["text"])
    )
    x_t = torch.linspace(-2, 2, 3 * 4 * 64, dtype=dtype).view(3, 4, 8, 8)
    return condition["text"], model.denoiser(x_t, 500, told).output


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_attachment_acts_while_applied_and_leaves_no_bit_behind(tiny_sd, dtype):
    model = open_model(tiny_sd, dtype=dtype)
    plain, weights, key = outputs(model, dtype), bits(model), model.content_hash()
    for name, touched in ((text_layer(model), 0), ("unet/conv_in", 1)):
        with shifted(model, name).applied(model):
            acted = outputs(model, dtype)
            assert not torch.equal(acted[touched], plain[touched])
            assert torch.equal(acted[1 - touched], plain[1 - touched])
            assert acted[0].dtype == dtype and bits(model) == weights
            assert model.content_hash() != key
        assert same(outputs(model, dtype), plain) and model.content_hash() == key
        assert not model.attached and stack_of(model) is None
        assert not any(attached_kinds(network) for network in model.components().values())


@pytest.mark.slow
def test_several_come_off_in_any_order(model):
    plain = outputs(model)
    edits = [shifted(model, values=[CONV], seed=1), shifted(model, "unet/conv_in", seed=2), shifted(model, seed=3)]
    alone = {}
    for kept in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in range(4)):
        for i in kept:
            edits[i].apply(model)
        alone[kept] = outputs(model), model.content_hash()
        for i in reversed(kept):
            edits[i].remove(model)
    assert len({key for _, key in alone.values()}) == 8 and same(alone[()][0], plain)
    for order in itertools.permutations(range(3)):
        for edit in edits:
            edit.apply(model)
        for n, removed in enumerate(order, 1):
            edits[removed].remove(model)
            expected, key = alone[tuple(sorted(order[n:]))]
            assert same(outputs(model), expected) and model.content_hash() == key


def test_the_first_applied_acts_first(model):
    name, hidden = text_layer(model), torch.linspace(-1, 1, 2 * 16).view(1, 2, 16)
    layer = model.component("text_encoder").get_submodule(name.partition("/")[2])
    plain = layer(hidden, None)
    a, b = torch.full((16,), 5.0), torch.full((16,), 7.0)
    for scale, by in ((2.0, a), (3.0, b)):
        attachment = EditAttachment("shifted", {"modules": [name], "scale": scale}, {"by": by})
        Edit(attachment=attachment).apply(model, allow_other_base=True)
    torch.testing.assert_close(layer(hidden, None), 3 * (2 * plain + a) + b)


def test_an_edit_of_a_model_with_an_attachment_belongs_to_both(model, tiny_sd):
    first = shifted(model)
    first.apply(model)
    second = shifted(model, "unet/conv_in")
    second.apply(model)
    with pytest.raises(ValueError, match="made for"):
        second.apply(open_model(tiny_sd))


def test_the_hash_reads_kind_options_tensors_and_order(model):
    edits = [shifted(model, seed=1), shifted(model, seed=2), shifted(model, "unet/conv_in", seed=1)]
    found = set()
    for order in itertools.permutations(edits):
        for edit in order:
            edit.apply(model)
        found.add(model.content_hash())
        for edit in order:
            edit.remove(model)
    assert len(found) == 6
    options = ({"modules": []}, {"modules": ["unet/conv_in"]})
    digests = {
        EditAttachment(kind, o, {"by": torch.full((2,), v)}).digest for kind in "ab" for o in options for v in (1, 2)
    }
    assert len(digests) == 8


def test_the_file_holds_weights_and_attachment(model, tmp_path):
    edit = shifted(model, values=[BIAS])
    path = edit.save(tmp_path / "edit.safetensors")
    assert load_file(path).keys() == {BIAS, "attachment/by"}
    read = Edit.load(path)
    assert read.values.keys() == {BIAS} and read.provenance == edit.provenance
    assert read.attachment.digest == edit.attachment.digest
    with edit.applied(model):
        expected = outputs(model)
    with read.applied(model):
        assert same(outputs(model), expected)
    alone = Edit(attachment=edit.attachment, provenance=edit.provenance)
    assert Edit.load(alone.save(tmp_path / "alone.safetensors")).shapes() == {}


def test_composing_keeps_one_attachment_and_refuses_two(model):
    weights = Edit({BIAS: torch.ones(8)}, {}, shifted(model).provenance)
    edit = shifted(model)
    for edits in ([edit, weights], [weights, edit]):
        composed = Edit.compose(edits)
        assert composed.attachment is edit.attachment and composed.values.keys() == {BIAS}
    assert Edit.compose([weights]).attachment is None
    with pytest.raises(ValueError, match="one attachment, not shifted and shifted: apply"):
        Edit.compose([edit, shifted(model)])


def test_what_does_not_fit_is_refused_before_anything_is_touched(model):
    plain, weights = outputs(model), bits(model)
    base = shifted(model).provenance
    by = {"by": torch.ones(16)}
    for kind, options, message in (
        ("nowhere", {}, "knows no attachment of the kind 'nowhere', only .*shifted"),
        ("shifted", {"modules": [text_layer(model), "unet/nowhere"]}, "no module unet/nowhere"),
        ("shifted", {"modules": ["transformer/conv_in"]}, "no module transformer/conv_in"),
        ("shifted", {"modules": [text_layer(model)], "width": 3}, "3 wide"),
    ):
        edit = Edit({CONV: torch.ones(model.parameters()[CONV].shape)}, {}, base, EditAttachment(kind, options, by))
        with pytest.raises(ValueError, match=message):
            edit.apply(model)
        assert bits(model) == weights and same(outputs(model), plain)
        assert not model.attached and stack_of(model) is None
    with pytest.raises(ValueError, match="not finite"):
        EditAttachment("shifted", {}, {"by": torch.full((2,), torch.nan)})
    with pytest.raises(TypeError, match="JSON"):
        EditAttachment("shifted", {"by": torch.ones(2)})


def test_stock_formats_refuse_it(model, tmp_path):
    edit, message = shifted(model), "attachment shifted, which"
    with pytest.raises(ValueError, match=message):
        edit.to_lora(model)
    with pytest.raises(ValueError, match=message):
        edit.fold(model, tmp_path / "folded")
    assert not model.attached
    student = copy.deepcopy(model.denoiser)
    with edit.applied(model):
        for write in (save_model, lambda m, f: export_student(m, student, f), lambda m, f: export_lora(m, student, f)):
            with pytest.raises(ValueError, match=message):
                write(model, tmp_path / "folder")
        with pytest.raises(ValueError, match=message):
            Edit({BIAS: torch.ones(8)}, {}, edit.provenance).fold(model, tmp_path / "folder", allow_other_base=True)
    with shifted(model, "unet/conv_in").applied(model):
        student = copy.deepcopy(model.denoiser)
    with pytest.raises(ValueError, match=message):
        export_student(model, student, tmp_path / "student")
    assert list(tmp_path.iterdir()) == []
    save_model(model, tmp_path / "folder")


def test_a_students_data_come_from_the_attached_text_encoder(model):
    source, random = ModelSource(model, PROMPTS), lambda: SampleRandom(0, 0, "student", range(4))
    plain = source.batch(random()).condition["text"]
    with shifted(model).applied(model):
        told = source.batch(random()).condition["text"]
        index = [(told[i] - model.encode_prompts(PROMPTS)["text"]).flatten(1).norm(dim=1).min() for i in range(4)]
    assert not torch.equal(told, plain) and max(index) < 1e-4


def test_what_is_attached_can_be_off_for_a_while(model):
    plain = outputs(model)
    for edit in (shifted(model, seed=1), shifted(model, seed=2), shifted(model, "unet/conv_in", seed=3)):
        edit.apply(model)
    acted, key, kinds = outputs(model), model.content_hash(), attached_kinds(model.denoiser)
    with pytest.raises(RuntimeError, match="midway"), detached(model):
        assert same(outputs(model), plain) and not model.attached and not attached_kinds(model.denoiser)
        assert model.content_hash() != key
        raise RuntimeError("midway")
    assert same(outputs(model), acted) and model.content_hash() == key and attached_kinds(model.denoiser) == kinds
    twin = copy.deepcopy(model.denoiser)
    strip(twin)
    assert not attached_kinds(twin) and same(outputs(model), acted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_student_starts_and_reads_without_what_is_attached_to_its_teacher(model, tmp_path, kind):
    (tmp_path / "prompts.txt").write_text("\n".join(prompt for prompt in PROMPTS if prompt))
    plain = outputs(model)
    for edit in (shifted(model, seed=1), shifted(model, "unet/conv_in", seed=3)):
        edit.apply(model)
    acted = outputs(model)
    data = {"prompts": str(tmp_path / "prompts.txt"), "teacher_steps": 1}
    needs = frozenset({"prompts"})
    for cache in (None, tmp_path / "cache"):
        options = DataConfig(**data, cache_dir=cache)
        source = make_source(model, options, 1.0, needs=needs, unattached=True, progress=False)
        told = source.batch(SampleRandom(0, 0, "student", range(6))).condition
        for condition, states in ((told.for_student(), plain[0]), (told.for_teacher(), acted[0])):
            nearest = [(states - text).flatten(1).norm(dim=1).min() for text in condition["text"]]
            assert max(nearest) < 1e-4
    config = DistillConfig(
        objective={
            "critic_updates": 1,
            "discriminator_width": 8,
            "student": {"learning_rate": 1e-9, "kind": kind, **({"rank": 2} if kind == "lora" else {})},
        },
        data=data,
        trainer={"output_dir": tmp_path / "run", "max_train_steps": 1, "train_batch_size": 2},
    )
    folder = distill(config, model, progress=False)
    assert same(outputs(model), acted)
    if kind == "full":
        for found, expected in zip(outputs(open_model(folder)), plain, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"kind": "lora", "rank": 2}], ids=["full", "lora"])
def test_players_of_an_attached_network_keep_it_and_learn_through_it(model, options):
    x_t = torch.linspace(-2, 2, 3 * 4 * 64).view(3, 4, 8, 8)
    condition = model.encode_prompts(PROMPTS)
    edit = shifted(model, "unet/conv_in", by=3.0)
    unedited = model.denoiser(x_t, 500, condition).output
    edit.apply(model)
    expected = model.denoiser(x_t, 500, condition).output
    player = make_player(model.denoiser, PlayerConfig(**options))
    installed = dict(model.attached[0].module.named_parameters())
    assert torch.equal(player.module(x_t, 500, condition).output, expected) and not torch.equal(expected, unedited)
    player.set_trainable(True)
    player.module(x_t, 500, condition).output.square().mean().backward()
    assert all(p.grad is None for p in installed.values())
    first = player.module.network.conv_in.weight if not options else next(iter(player.trainable().values()))
    assert first.grad is not None
    edit.remove(model)
    assert torch.equal(model.denoiser(x_t, 500, condition).output, unedited)
    assert torch.equal(player.module(x_t, 500, condition).output, expected)
