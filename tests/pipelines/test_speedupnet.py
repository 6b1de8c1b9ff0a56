"""SpeedUpNet's adapter: attention written out, what it must leave alone, and moving it to another checkpoint."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention

from sublimate.pipelines.attachments import export_attachment
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.pipelines.negative_attention import attention_layers, install_negative_attention
from sublimate.pipelines.speedupnet import (
    NAME,
    SpeedUpAttention,
    attach_speedupnet,
    detach_speedupnet,
    install_speedupnet,
)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    attention = Attention(8, cross_attention_dim=6, heads=2, dim_head=4, bias=True).eval()
    attention.plain = copy.deepcopy(attention)
    attention.set_processor(SpeedUpAttention(attention))
    return attention


def stirred(module):
    """The adapter away from its start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def attended(query, key, value):
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (query, key, value))
    return ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_it_is_its_formula(layer):
    sun = layer.processor
    stirred(sun)
    x, positive, negative = draws(3, 5, 8), draws(3, 4, 6, seed=1), draws(3, 7, 6, seed=2)
    found = layer(x, encoder_hidden_states=positive, negative=negative)
    z = attended(layer.to_q(x), layer.to_k(positive), layer.to_v(positive))
    away = attended(layer.to_q(x), sun.to_k_negative(negative), sun.to_v_negative(negative))
    unit = away / away.square().sum(-1, keepdim=True).sqrt()
    z = z - (sun.scale * z.square().sum(-1, keepdim=True).sqrt() * unit + sun.shift)
    torch.testing.assert_close(found, layer.to_out[0](z), rtol=1e-5, atol=1e-6)


def test_it_starts_as_its_base_and_without_negatives_stays_it(layer):
    x, positive, negative = draws(3, 5, 8), draws(3, 4, 6, seed=1), draws(3, 7, 6, seed=2)
    expected = layer.plain(x, encoder_hidden_states=positive)
    torch.testing.assert_close(layer(x, encoder_hidden_states=positive, negative=negative), expected)
    stirred(layer.processor)
    torch.testing.assert_close(layer(x, encoder_hidden_states=positive), expected)


def test_no_sample_sees_another(layer):
    """The released code normalises over the whole batch."""
    stirred(layer.processor)
    x, positive, negative = draws(3, 5, 8), draws(3, 4, 6, seed=1), draws(3, 7, 6, seed=2)
    before = layer(x, encoder_hidden_states=positive, negative=negative)
    other = negative.clone()
    other[2] *= 100
    after = layer(x, encoder_hidden_states=positive, negative=other)
    assert torch.equal(before[:2], after[:2]) and not torch.equal(before[2], after[2])


@pytest.fixture
def exported(tiny_sd_v, tmp_path):
    """A folder with an adapter away from its start."""
    model = open_model(tiny_sd_v)
    adapter = install_speedupnet(model.denoiser.network)
    stirred(adapter)
    return export_attachment(
        model, adapter, tmp_path / "sun", name=NAME, options={"sampling_steps": 4}, usage="", summary="An adapter."
    )


OPTIONS = {"steps": 2, "guidance_scale": 1.0}


def test_it_attaches_draws_and_comes_off_bit_for_bit(tiny_sd_v, exported):
    model = open_model(tiny_sd_v)
    before, plain = model.content_hash(), generate(model, ["a dog"], **OPTIONS)
    processors = [layer.processor for layer in attention_layers(model.denoiser.network)]
    attach_speedupnet(model, exported)
    one, other, none = (generate(model, ["a dog"], negative_prompt=p, **OPTIONS) for p in ("gogh", "red cat", None))
    assert not torch.equal(one, other) and not torch.equal(one, plain) and not torch.equal(none, plain)
    with pytest.raises(ValueError, match="replaces guidance"):
        generate(model, ["a dog"], steps=2, guidance_scale=3.0)
    detach_speedupnet(model)
    assert model.content_hash() == before
    assert [layer.processor for layer in attention_layers(model.denoiser.network)] == processors
    assert torch.equal(generate(model, ["a dog"], **OPTIONS), plain)


def test_it_moves_to_another_fine_tune_of_the_same_base(tiny_sd, tiny_sd_v, exported):
    """Another checkpoint of the same architecture; the adapter's weights are the same in both."""
    first, second = open_model(tiny_sd_v), open_model(tiny_sd)
    attach_speedupnet(first, exported)
    attach_speedupnet(second, exported)
    pairs = zip(attention_layers(first.denoiser.network), attention_layers(second.denoiser.network), strict=True)
    for one, other in pairs:
        if isinstance(one.processor, SpeedUpAttention):
            state = other.processor.state_dict()
            assert all(torch.equal(value, state[name]) for name, value in one.processor.state_dict().items())
    plain = generate(open_model(tiny_sd), ["a dog"], **OPTIONS)
    assert not torch.equal(generate(second, ["a dog"], negative_prompt="gogh", **OPTIONS), plain)


def test_misuse_is_named(tiny_sd, tiny_sd3, tiny_unconditional, exported):
    with pytest.raises(ValueError, match="has no cross-attention"):
        attach_speedupnet(open_model(tiny_sd3), exported)
    model = open_model(tiny_sd)
    with pytest.raises(ValueError, match="has no SpeedUpNet attached"):
        detach_speedupnet(model)
    with pytest.raises(ValueError, match="holds no attachment"):
        attach_speedupnet(model, tiny_unconditional)
    install_negative_attention(model.denoiser.network)
    with pytest.raises(ValueError, match="reads negative prompts already"):
        attach_speedupnet(model, exported)


def test_an_adapter_of_another_architecture_leaves_the_model_alone(tiny_sd, exported, tmp_path):
    model = open_model(tiny_sd)
    plain = generate(model, ["a dog"], **OPTIONS)
    wider = torch.nn.ModuleList([SpeedUpAttention(Attention(8, cross_attention_dim=6, heads=2, dim_head=4))])
    folder = export_attachment(model, wider, tmp_path / "other", name=NAME, options={}, usage="", summary="Another.")
    with pytest.raises(ValueError, match="does not fit the model"):
        attach_speedupnet(model, folder)
    assert torch.equal(generate(model, ["a dog"], **OPTIONS), plain)
