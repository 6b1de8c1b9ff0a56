"""Redirected self-attention against attention written out, and what it must leave alone."""

import pytest
import torch
from diffusers.models.attention_processor import Attention

from sublimate.pipelines.attention import set_attention
from sublimate.pipelines.model import open_model
from sublimate.pipelines.negative_attention import attention_layers
from sublimate.pipelines.redirection import RedirectedAttention, Redirection, redirected, self_attention

HEIGHT, WIDTH = 3, 5


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Attention(8, heads=2, dim_head=4, bias=True).eval()


@pytest.fixture
def redirection(layer):
    state = Redirection()
    state.size, state.similarity = (HEIGHT, WIDTH), 0.3
    state.objects = torch.zeros(3, 1, HEIGHT, WIDTH)
    state.objects[1, 0, 1:, 2:4] = 1
    state.objects[2, 0, 0] = 1
    layer.set_processor(RedirectedAttention(layer.processor, state))
    return state


def by_hand(layer, x, objects, similarity):
    """Both branches with S written out, then put together row by row."""
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (layer.to_q(x), layer.to_k(x), layer.to_v(x)))
    logits = q @ k.transpose(-1, -2) / 2
    rows = objects.flatten(1)[:, None, :, None]
    blind = torch.zeros_like(logits).masked_fill(rows.mT > 0, -torch.inf)
    background, inside = ((s * logits + blind).softmax(-1) @ v for s in (1.0, similarity))
    return layer.to_out[0]((rows * inside + (1 - rows) * background).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("similarity", (1.0, 0.3))
def test_it_is_both_branches_put_together(layer, redirection, similarity):
    redirection.similarity = similarity
    x = draws(3, HEIGHT * WIDTH, 8)
    expected = by_hand(layer, x, redirection.objects, similarity)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_what_the_object_shows_reaches_no_row_but_its_own(layer, redirection):
    x, other = draws(3, HEIGHT * WIDTH, 8), draws(3, HEIGHT * WIDTH, 8, seed=1)
    inside = redirection.objects.flatten(1)[..., None] > 0
    changed = layer(torch.where(inside, other, x)) != layer(x)
    assert torch.equal(changed.any(-1), inside[..., 0])


def test_samples_without_an_object_or_without_a_background_attend_as_ever(layer, redirection):
    x = draws(3, HEIGHT * WIDTH, 8)
    redirection.objects[2] = 1
    found = layer(x)
    redirection.objects = None
    torch.testing.assert_close(found[[0, 2]], layer(x)[[0, 2]], rtol=1e-5, atol=1e-6)


def test_a_thin_object_survives_at_every_resolution_and_pooling_keeps_its_place():
    state = Redirection()
    state.objects = torch.zeros(1, 1, 8, 16)
    state.objects[0, 0, :, 9] = 1
    for height, width in ((8, 16), (4, 8), (2, 4)):
        state.size = height, width
        rows = state.rows().reshape(height, width)
        assert rows.any(0).nonzero().flatten().tolist() == [9 * width // 16] and rows.any(1).all()


def test_a_transposed_map_gives_the_transposed_result(layer, redirection):
    def turned(x):
        return x.unflatten(1, redirection.size).transpose(1, 2).flatten(1, 2)

    x = draws(3, HEIGHT * WIDTH, 8)
    found, x = turned(layer(x)), turned(x)
    redirection.objects, redirection.size = redirection.objects.mT, (WIDTH, HEIGHT)
    torch.testing.assert_close(layer(x), found, rtol=1e-5, atol=1e-6)


def names(network, layers):
    known = {id(layer): name for name, layer in attention_layers(network).items()}
    return [known[id(layer)] for layer in layers]


def test_layers_come_in_the_order_in_which_they_run(tiny_sd):
    model, ran = open_model(tiny_sd), []
    layers = self_attention(model.denoiser.network)
    hooks = [layer.register_forward_hook(lambda module, *_: ran.append(module)) for layer in layers]
    model.denoiser(draws(1, 4, 8, 8), 500, model.null_condition())
    for hook in hooks:
        hook.remove()
    found = names(model.denoiser.network, layers)
    assert names(model.denoiser.network, ran) == found and len(found) == 4
    assert all(name.endswith("attn1") for name in found) and found[1].startswith("mid_block")


def test_a_share_of_the_layers_is_redirected_and_each_is_told_its_own_maps_size(tiny_sd):
    model, seen = open_model(tiny_sd), []
    network = model.denoiser.network
    with redirected(network, first=0.5) as redirection:
        layers = self_attention(network)
        assert [isinstance(layer.processor, RedirectedAttention) for layer in layers] == [False, False, True, True]
        rows = redirection.rows
        redirection.rows = lambda: seen.append(redirection.size) or rows()
        redirection.objects = torch.ones(1, 1, 9, 6)
        redirection.objects[..., 0] = 0
        model.denoiser(draws(1, 4, 9, 6), 500, model.null_condition())
    assert seen == [(5, 3), (5, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ("math", "eager"))
def test_the_chosen_kernel_runs_it_too(tiny_sd, kernel):
    model, x_t = open_model(tiny_sd), draws(1, 4, 8, 8)
    objects = torch.zeros(1, 1, 8, 8)
    objects[..., 2:5, 4:] = 1

    def output():
        with redirected(model.denoiser.network) as redirection:
            redirection.objects, redirection.similarity = objects, 0.3
            return model.denoiser(x_t, 500, model.null_condition()).output

    expected = output()
    set_attention(model, kernel)
    torch.testing.assert_close(output(), expected, rtol=1e-5, atol=1e-5)


def test_processors_and_hooks_are_put_back_also_after_an_error(tiny_sd):
    network = open_model(tiny_sd).denoiser.network
    before = {name: layer.processor for name, layer in attention_layers(network).items()}
    with pytest.raises(RuntimeError), redirected(network):
        raise RuntimeError
    assert all(layer.processor is before[name] for name, layer in attention_layers(network).items())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_what_cannot_be_redirected_is_refused(tiny_sd):
    network = open_model(tiny_sd).denoiser.network
    network.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse"), redirected(network):
        pass
    network.unfuse_qkv_projections()
    self_attention(network)[0].norm_q = torch.nn.LayerNorm(4)
    with pytest.raises(ValueError, match="normalises"), redirected(network):
        pass
