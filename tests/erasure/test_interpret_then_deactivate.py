"""Interpret-then-Deactivate: chosen features, the gate that leaves safe prompts bit-identical, and what it refuses."""

import pytest
import torch

from sublimate.erasure.methods.interpret_then_deactivate import InterpretThenDeactivate
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.sparse_features import contrasted, peaks, strongest
from sublimate.pipelines.attached.deactivated_features import DeactivatedFeatures, residual_blocks
from sublimate.pipelines.edit import Edit
from sublimate.pipelines.edit_attachment import EditAttachment
from sublimate.pipelines.features import tapped
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.pipelines.sparse_autoencoder import SparseAutoencoder
from sublimate.training.sparse_autoencoder import StatesSource

OPTIONS = {
    "autoencoder": {"expansion": 4, "k": 4, "aux_k": 8, "learning_rate": 1e-2},
    "features": 64,
    "max_train_steps": 10,
    "train_batch_size": 4,
    "templates": ("{}", "a {}", "a photo of a {}"),
}
REQUEST = Request(Concept("cat", synonyms=("gogh",)), preserve=["seven", "red"])


@pytest.fixture
def model(tiny_sd):
    return open_model(tiny_sd)


def fitted(model, request=REQUEST, **options):
    return InterpretThenDeactivate(**OPTIONS | options).fit(model, request, seed=1)


def texts(concepts, templates=OPTIONS["templates"]):
    return [phrase.text for concept in concepts for phrase in concept.phrases(templates)]


def parts(model, edit):
    """Where the edit's states come from, its autoencoder, and what its features are multiplied by."""
    tensors, options = dict(edit.attachment.tensors), edit.attachment.options
    scale = tensors.pop("scale")
    autoencoder = SparseAutoencoder(*reversed(tensors["decoder"].shape), options["k"])
    autoencoder.load_state_dict(tensors)
    block = residual_blocks(model.component("text_encoder"))[options["block"]]
    return StatesSource(model, "text_encoder", block, []), autoencoder, scale


@torch.no_grad()
def conditions(model, prompts):
    """Each prompt encoded alone, since the size of a batch may change a kernel's last bits."""
    return [model.encode_prompts([prompt])["text"] for prompt in prompts]


def test_the_strongest_features_are_those_of_all_rows_together():
    codes = torch.tensor([[0.0, 3.0, 1.0, 2.0, 0.0], [5.0, 0.0, 0.0, 0.5, 0.0]])
    assert strongest(codes, 2).tolist() == [True, True, False, False, False]
    assert strongest(codes, 1).tolist() == [True, False, False, False, False]
    assert strongest(codes, 9).tolist() == [True, True, True, True, False]


def test_features_are_those_of_any_concept_without_those_of_anything_retained():
    generator = torch.Generator().manual_seed(0)
    concepts, retained = ([torch.rand(3, 40, generator=generator) for _ in range(n)] for n in (2, 3))

    def top(codes):
        highest = [max(codes[:, j].tolist()) for j in range(40)]
        return set(sorted(range(40), key=highest.__getitem__)[-7:])

    mine, others = (set().union(*map(top, groups)) for groups in (concepts, retained))
    found = contrasted(concepts, retained, 7)
    assert set(found.nonzero().flatten().tolist()) == mine - others and mine & others


@pytest.mark.parametrize(("gate", "tau", "block"), [("max", 0.0, 0), ("mean", -2.0, 1)])
def test_the_hook_computes_the_formula_and_leaves_the_first_token(model, gate, tau, block):
    generator = torch.Generator().manual_seed(0)
    names = residual_blocks(model.component("text_encoder"))
    draw = {n: torch.randn(s, generator=generator) for n, s in (("encoder", (24, 16)), ("decoder", (24, 16)))}
    draw |= {"latent_bias": torch.zeros(24), "bias": torch.randn(16, generator=generator)}
    scale = torch.ones(24).masked_fill(torch.arange(24) % 3 == 0, tau)
    autoencoder = SparseAutoencoder(16, 24, 5)
    autoencoder.load_state_dict(draw)
    prompts = ["a cat", "seven"]
    with torch.no_grad():
        with tapped(model.component("text_encoder"), [names[block]]) as taps:
            plain = model.encode_prompts(prompts)["text"]
        before = taps[names[block]]
        codes = autoencoder.encode(before[:, 1:])
        error = (autoencoder.decode(codes * scale) - autoencoder.decode(codes)).square().mean(-1)
        change = error.max(1).values if gate == "max" else error.mean(1)
        lower, upper = change.sort().values.tolist()
        options = {"component": "text_encoder", "block": block, "k": 5, "gate": gate}
        attachment = EditAttachment(
            "deactivated_features", {**options, "threshold": (lower + upper) / 2}, draw | {"scale": scale}
        )
        Edit(attachment=attachment).apply(model, allow_other_base=True)
        with tapped(model.component("text_encoder"), [names[block]]) as taps:
            told = model.encode_prompts(prompts)["text"]
    edited, spared = int(change.argmax()), int(change.argmin())
    after = taps[names[block]]
    torch.testing.assert_close(after[edited, 1:], autoencoder.decode(codes * scale)[edited])
    assert torch.equal(after[edited, 0], before[edited, 0])
    assert torch.equal(after[spared], before[spared]) and torch.equal(told[spared], plain[spared])
    assert not torch.equal(told[edited], plain[edited])


@pytest.mark.slow
def test_safe_prompts_are_bit_identical_and_the_concepts_are_not(model):
    edit = fitted(model)
    safe, asked = ["", *texts(REQUEST.preserve)], texts(REQUEST.erase)
    plain, told = conditions(model, safe), conditions(model, asked)
    draw = {"steps": 2, "guidance_scale": 3.0, "seed": 4}
    images = [generate(model, [prompt], **draw) for prompt in (safe[1], asked[0])]
    with edit.applied(model):
        assert all(torch.equal(x, y) for x, y in zip(conditions(model, safe), plain, strict=True))
        assert not any(torch.equal(x, y) for x, y in zip(conditions(model, asked), told, strict=True))
        again = [generate(model, [prompt], **draw) for prompt in (safe[1], asked[0])]
        # In one batch with a prompt that is edited, too.
        mixed = model.encode_prompts([asked[0], safe[1]])["text"]
    assert torch.equal(again[0], images[0]) and not torch.equal(again[1], images[1])
    torch.testing.assert_close(mixed[1:], plain[1])
    assert torch.equal(mixed[1], model.encode_prompts([asked[0], safe[1]])["text"][1])
    assert edit.attachment.kind == "deactivated_features" and edit.shapes() == {}
    assert edit.provenance["artefact"] == "attachment" and edit.provenance["method"] == "interpret_then_deactivate"


@pytest.mark.slow
def test_half_precision_passes_safe_prompts_through_too(tiny_sd, model):
    edit, half = fitted(model), open_model(tiny_sd, dtype=torch.float16)
    plain, told = conditions(half, ["seven", "a cat"])
    with edit.applied(half, allow_other_base=True):
        again = conditions(half, ["seven", "a cat"])
    assert torch.equal(again[0], plain) and not torch.equal(again[1], told) and again[1].dtype == torch.float16


@pytest.mark.slow
@pytest.mark.parametrize(("gate", "tau"), [("max", 0.0), ("mean", -3.0)])
def test_features_and_threshold_are_what_the_prompts_say(model, gate, tau):
    edit = fitted(model, gate=gate, tau=tau, margin=0.9, features=6)
    source, autoencoder, scale = parts(model, edit)
    concepts = [peaks(source, autoencoder, texts([concept])) for concept in REQUEST.erase]
    kept = [[""], *(texts([concept]) for concept in REQUEST.preserve)]
    expected = contrasted(concepts, [peaks(source, autoencoder, group) for group in kept], 6)
    assert torch.equal(scale, torch.where(expected, tau, 1.0)) and expected.any()
    codes = autoencoder.encode(source.states(texts(REQUEST.erase))).detach()
    moved = ((1 - tau) * codes * expected @ autoencoder.decoder.detach()).square().mean(-1)
    change = moved.amax(1) if gate == "max" else moved.mean(1)
    assert edit.attachment.options["threshold"] == pytest.approx(0.9 * float(change[change > 0].min()), rel=1e-4)


@pytest.mark.slow
def test_generic_prompts_train_and_are_left_alone_unless_they_name_the_concept(model, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a Cat in style\na dog\na van\na painting\n")
    edit = fitted(model, prompts=str(file), retained=2)
    source, autoencoder, scale = parts(model, edit)
    concepts = [peaks(source, autoencoder, texts([concept])) for concept in REQUEST.erase]
    kept = [[""], *(texts([concept]) for concept in REQUEST.preserve), ["a dog"], ["a van"]]
    assert torch.equal(scale == 0, contrasted(concepts, [peaks(source, autoencoder, group) for group in kept], 64))
    assert (peaks(source, autoencoder, ["a dog", "a van"])[:, scale == 0] == 0).all()
    assert not torch.equal(edit.attachment.tensors["decoder"], fitted(model).attachment.tensors["decoder"])


def test_what_leaves_no_feature_is_refused(model):
    source, autoencoder, _ = parts(model, fitted(model))
    eraser, asked = InterpretThenDeactivate(**OPTIONS), texts(REQUEST.erase)
    with pytest.raises(ValueError, match="Every feature of what is erased"):
        eraser._deactivation(source, autoencoder, [asked], [[*asked, "seven"]])
    scale, threshold = eraser._deactivation(source, autoencoder, [asked], [["seven"]])
    assert threshold > 0 and (scale == 0).any()


@pytest.mark.slow
def test_only_a_single_clip_encoder_is_served(model, tiny_sd3, tiny_unconditional):
    for other, message in ((tiny_sd3, "has text_encoder, text_encoder_2"), (tiny_unconditional, "has none: use")):
        with pytest.raises(ValueError, match=message):
            fitted(open_model(other))
    with pytest.raises(ValueError, match="2 blocks, none of number 2"):
        fitted(model, block=2)
    edit = fitted(model, block=1)
    with pytest.raises(ValueError, match="no network 'text_encoder'"):
        edit.apply(open_model(tiny_unconditional), allow_other_base=True)
    beyond = EditAttachment(edit.attachment.kind, {**edit.attachment.options, "block": 2}, edit.attachment.tensors)
    with pytest.raises(ValueError, match="no block 2 of CLIP"):
        Edit(attachment=beyond).apply(model, allow_other_base=True)
    assert edit.attachment.options["block"] == 1 and fitted(model).attachment.options["block"] == 0


def test_another_width_is_refused_before_anything_is_touched(model):
    attachment = fitted(model).attachment
    narrow = {n: t[:, :8] if n in ("encoder", "decoder") else t for n, t in attachment.tensors.items()}
    edit = Edit(attachment=EditAttachment(attachment.kind, attachment.options, narrow))
    with pytest.raises(ValueError, match="not 8 wide"):
        edit.apply(model, allow_other_base=True)
    assert not model.attached


def test_gradients_reach_prompts_through_the_edit():
    autoencoder = SparseAutoencoder(4, 6, 2)
    with torch.no_grad():
        for i, p in enumerate(autoencoder.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    features = DeactivatedFeatures(autoencoder, torch.zeros(6), 0.0, "max")
    states = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(9), requires_grad=True)
    scaled = DeactivatedFeatures(autoencoder, torch.tensor([0.0, 1, 1, 1, 1, 1]), 0.0, "max")
    scaled(states).square().sum().backward()
    assert states.grad[:, 1:].abs().sum() > 0
    assert torch.equal(features(states)[:, 1:], autoencoder.bias.expand(1, 2, 4))
