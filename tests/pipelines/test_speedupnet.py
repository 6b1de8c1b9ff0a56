"""SpeedUpNet's adapter: attention written out, what it must leave alone, and moving it to another checkpoint."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, inject_adapter_in_model

from sublimate.pipelines.attachments import export_attachment
from sublimate.pipelines.attention import set_attention
from sublimate.pipelines.export import save_model
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import Model, open_model
from sublimate.pipelines.negative_attention import attention_layers, install_negative_attention
from sublimate.pipelines.speedupnet import (
    NAME,
    SpeedUpAttention,
    attach_speedupnet,
    detach_speedupnet,
    install_speedupnet,
    negative_strength,
)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(**options):
    torch.manual_seed(0)
    attention = Attention(8, cross_attention_dim=6, heads=2, dim_head=4, bias=True).eval()
    attention.plain = copy.deepcopy(attention)
    attention.set_processor(SpeedUpAttention(attention, **options))
    return attention


X, POSITIVE, NEGATIVE_STATES = draws(3, 5, 8), draws(3, 4, 6, seed=1), draws(3, 7, 6, seed=2)
STRENGTH = torch.tensor([0.5, 0.0, 0.9])
TOLD = {"encoder_hidden_states": POSITIVE, "negative": NEGATIVE_STATES, "strength": STRENGTH}


def stirred(module):
    """The adapter away from its start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def attended(query, key, value):
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (query, key, value))
    return ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)


def branch_by_hand(layer, branch, z, states):
    y = attended(layer.to_q(X), branch.to_k(states), branch.to_v(states))
    unit = y / y.square().sum(-1, keepdim=True).sqrt()
    return branch.scale * z.square().sum(-1, keepdim=True).sqrt() * unit + branch.shift


@pytest.mark.parametrize("positive", [False, True])
def test_it_is_its_formula(positive):
    layer = make_layer(positive=positive)
    sun = layer.processor
    stirred(sun)
    z = attended(layer.to_q(X), layer.to_k(POSITIVE), layer.to_v(POSITIVE))
    change = -branch_by_hand(layer, sun.negative, z, NEGATIVE_STATES)
    if positive:
        change = change + branch_by_hand(layer, sun.positive, z, POSITIVE)
    expected = layer.to_out[0](z + STRENGTH[:, None, None] * change)
    torch.testing.assert_close(layer(X, **TOLD), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positive", [False, True])
def test_it_starts_as_its_base_and_without_guidance_stays_it(positive):
    layer = make_layer(positive=positive)
    expected = layer.plain(X, encoder_hidden_states=POSITIVE)
    assert torch.equal(layer(X, **TOLD), expected)
    stirred(layer.processor)
    assert torch.equal(layer(X, **TOLD)[1], expected[1])
    assert not torch.equal(layer(X, **TOLD)[0], expected[0])
    assert torch.equal(layer(X, encoder_hidden_states=POSITIVE), expected)


def test_the_published_start_is_guided_attention_over_the_scale():
    layer = make_layer(initial_scale=1.0)
    z = attended(layer.to_q(X), layer.to_k(POSITIVE), layer.to_v(POSITIVE))
    same = layer(X, encoder_hidden_states=POSITIVE, negative=POSITIVE, strength=negative_strength(torch.full((3,), 4)))
    torch.testing.assert_close(same, layer.to_out[0](z / 4), rtol=1e-5, atol=1e-6)
    layer = make_layer(initial_scale=1.0, positive=True)
    same = layer(X, encoder_hidden_states=POSITIVE, negative=POSITIVE, strength=STRENGTH)
    torch.testing.assert_close(same, layer.to_out[0](z), rtol=1e-5, atol=1e-6)


def test_gradients_reach_scale_and_shift_first_and_then_everything():
    layer = make_layer(positive=True)
    layer(X, **TOLD).square().sum().backward()
    for name, p in layer.processor.named_parameters():
        assert bool(p.grad.any()) == name.endswith(("scale", "shift")), name
    stirred(layer.processor)
    layer(X, **TOLD).square().sum().backward()
    assert all(bool(p.grad.any()) for p in layer.processor.parameters())


@pytest.mark.parametrize("changed", ["negative", "encoder_hidden_states", "strength"])
def test_no_sample_sees_another(changed):
    """The released code normalises over the whole batch."""
    layer = make_layer(positive=True)
    stirred(layer.processor)
    other = TOLD[changed].clone()
    other[2] *= 100
    before, after = layer(X, **TOLD), layer(X, **{**TOLD, changed: other})
    assert torch.equal(before[:2], after[:2]) and not torch.equal(before[2], after[2])


def test_no_token_sees_another():
    layer = make_layer(positive=True)
    stirred(layer.processor)
    x = X.clone()
    x[:, 1] *= 50
    before, after = layer(X, **TOLD), layer(x, **TOLD)
    torch.testing.assert_close(before[:, 2:], after[:, 2:], rtol=1e-6, atol=1e-6)


OPTIONS = {"positive": True, "guidance_scale": 3.0, "steps": 2}


@pytest.fixture
def exported(tiny_sd_v, tmp_path):
    """A folder with an adapter away from its start."""
    model = open_model(tiny_sd_v)
    adapter = install_speedupnet(model.denoiser.network, positive=True)
    stirred(adapter)
    return export_attachment(
        model, adapter, tmp_path / "sun", name=NAME, options=OPTIONS, usage="", summary="An adapter."
    )


def processors(model):
    return [layer.processor for layer in attention_layers(model.denoiser.network).values()]


@pytest.mark.slow
def test_it_attaches_draws_and_comes_off_bit_for_bit(tiny_sd_v, exported):
    model = open_model(tiny_sd_v)
    unguided = {"steps": 2, "guidance_scale": 1.0}
    before, plain, original = model.content_hash(), generate(model, ["a dog"], **unguided), processors(model)
    attach_speedupnet(model, exported)
    assert model.content_hash() == before  # its edits still apply
    one, other, none = (generate(model, ["a dog"], negative_prompt=p) for p in ("gogh", "red cat", None))
    assert not torch.equal(one, other) and not torch.equal(one, plain) and not torch.equal(none, plain)
    assert torch.equal(generate(model, ["a dog"], negative_prompt="gogh", **unguided), plain)
    detach_speedupnet(model)
    assert model.content_hash() == before
    assert processors(model) == original
    assert torch.equal(generate(model, ["a dog"], **unguided), plain)


@pytest.mark.slow
def test_a_read_adapter_draws_what_the_exported_one_drew(tiny_sd_v, exported):
    ours, read = open_model(tiny_sd_v), open_model(tiny_sd_v)
    adapter = install_speedupnet(ours.denoiser.network, positive=True)
    stirred(adapter)
    attach_speedupnet(read, exported)
    drawn = {"steps": 2, "negative_prompt": "gogh", "guidance_scale": 3.0}
    assert torch.equal(generate(ours, ["a dog"], **drawn), generate(read, ["a dog"], **drawn))


@pytest.mark.slow
def test_its_scale_and_steps_are_the_defaults_and_a_step_is_one_pass(tiny_sd_v, exported):
    model = open_model(tiny_sd_v)
    attach_speedupnet(model, exported)
    passes = []
    hook = model.denoiser.network.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    images = generate(model, ["a dog", "cat"], negative_prompt="gogh")
    hook.remove()
    assert passes == [2, 2]
    asked = {"steps": 2, "guidance_scale": 3.0, "negative_prompt": "gogh"}
    assert torch.equal(generate(model, ["a dog", "cat"], **asked), images)
    assert not torch.equal(generate(model, ["a dog", "cat"], **{**asked, "guidance_scale": 1.5}), images)
    one = generate(model, ["a dog", "cat"], batch_size=1, **asked)
    torch.testing.assert_close(one, images, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_moves_to_another_fine_tune_of_the_same_base(tiny_sd, tiny_sd_v, exported):
    """Another checkpoint of the same architecture; the adapter's weights are the same in both."""
    model = open_model(tiny_sd)
    plain = generate(model, ["a dog"], steps=2, guidance_scale=1.0)
    attach_speedupnet(model, exported)
    first = open_model(tiny_sd_v)
    attach_speedupnet(first, exported)
    for one, other in zip(processors(first), processors(model), strict=True):
        if isinstance(one, SpeedUpAttention):
            state = other.state_dict()
            assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    steered = generate(model, ["a dog"], negative_prompt="gogh")
    assert steered.isfinite().all() and not torch.equal(steered, plain)
    assert not torch.equal(steered, generate(first, ["a dog"], negative_prompt="gogh"))
    detach_speedupnet(model)
    assert torch.equal(generate(model, ["a dog"], steps=2, guidance_scale=1.0), plain)


@pytest.mark.slow
def test_it_plugs_into_a_model_with_a_lora(tiny_sd, exported):
    model = open_model(tiny_sd)
    attach_speedupnet(model, exported)
    expected = generate(model, ["a dog"], negative_prompt="gogh")
    detach_speedupnet(model)
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    inject_adapter_in_model(config, model.denoiser.network)
    attach_speedupnet(model, exported)
    # A fresh LoRA changes nothing yet.
    torch.testing.assert_close(generate(model, ["a dog"], negative_prompt="gogh"), expected)


@pytest.mark.slow
def test_it_follows_the_models_precision(tiny_sd_v, exported):
    model = open_model(tiny_sd_v, dtype=torch.bfloat16)
    attach_speedupnet(model, exported)
    images = generate(model, ["a dog"], negative_prompt="gogh")
    expected = open_model(tiny_sd_v)
    attach_speedupnet(expected, exported)
    assert (images - generate(expected, ["a dog"], negative_prompt="gogh")).abs().mean() < 0.02


def test_another_architecture_is_refused_and_left_alone(tiny_sd, exported):
    pipeline = open_model(tiny_sd).pipeline
    config = {**pipeline.unet.config, "block_out_channels": (8, 32)}
    parts = {**pipeline.components, "unet": UNet2DConditionModel.from_config(config)}
    model = Model(StableDiffusionPipeline(**parts, requires_safety_checker=False), "wider")
    before, original = model.content_hash(), processors(model)
    with pytest.raises(ValueError, match="does not fit the model"):
        attach_speedupnet(model, exported)
    assert model.content_hash() == before
    assert processors(model) == original


def test_masked_text_is_refused(tiny_pixart, exported):
    with pytest.raises(ValueError, match="this model masks the padding of its text"):
        attach_speedupnet(open_model(tiny_pixart), exported)


@pytest.mark.slow
def test_misuse_is_named(tiny_sd, tiny_sd3, tiny_unconditional, exported, tmp_path):
    for folder in (tiny_sd3, tiny_unconditional):
        with pytest.raises(ValueError, match="has no cross-attention"):
            attach_speedupnet(open_model(folder), exported)
    model = open_model(tiny_sd)
    with pytest.raises(ValueError, match="has no SpeedUpNet attached"):
        detach_speedupnet(model)
    with pytest.raises(ValueError, match="holds no attachment"):
        attach_speedupnet(model, tiny_unconditional)
    attach_speedupnet(model, exported)
    with pytest.raises(ValueError, match="reads negative prompts already"):
        attach_speedupnet(model, exported)
    with pytest.raises(ValueError, match="reads negative prompts already"):
        generate(model, ["a dog"], guidance_scale=1.0, negative_prompt="gogh", negative_strength=0.3)
    with pytest.raises(ValueError, match=r"1, which is none, or more, not 0\.5"):
        generate(model, ["a dog"], guidance_scale=0.5)
    with pytest.raises(ValueError, match="carries a SpeedUpNet, which stock diffusers cannot hold: detach it"):
        save_model(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="Choose the attention kernel before"):
        set_attention(model, "math")
    detach_speedupnet(model)
    install_negative_attention(model.denoiser.network)
    with pytest.raises(ValueError, match="reads negative prompts already"):
        attach_speedupnet(model, exported)


def test_a_chosen_kernel_is_not_silently_dropped(tiny_sd, exported):
    model = open_model(tiny_sd)
    set_attention(model, "math")
    with pytest.raises(ValueError, match="not of ChosenProcessor"):
        attach_speedupnet(model, exported)
    set_attention(model, "auto")
    attach_speedupnet(model, exported)
