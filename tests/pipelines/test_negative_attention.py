"""Negative attention against attention written out, and what it must leave alone."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxPosEmbed
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines.attention import set_attention
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.pipelines.negative_attention import (
    MASK,
    NEGATIVE,
    STRENGTH,
    NegativeAttention,
    NegativeJointAttention,
    as_negative,
    install_negative_attention,
    negative_attention,
    remove_negative_attention,
    takes_negatives,
)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    attention = Attention(8, cross_attention_dim=6, heads=2, dim_head=4, bias=True).eval()
    attention.set_processor(NegativeAttention(attention.processor))
    return attention


def by_hand(layer, x, text):
    """softmax(Q K^T / sqrt(d)) V with the layer's own projections, before the output projection."""
    q, k, v = layer.to_q(x), layer.to_k(text), layer.to_v(text)
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v))
    return ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_it_is_the_difference_of_two_attentions_before_the_output_projection(layer):
    x, positive, negative = draws(3, 5, 8), draws(3, 4, 6, seed=1), draws(3, 7, 6, seed=2)
    strength = torch.tensor([0.2, 0.0, 1.5])
    found = layer(x, encoder_hidden_states=positive, negative=negative, strength=strength)
    z = by_hand(layer, x, positive) - strength[:, None, None] * by_hand(layer, x, negative)
    torch.testing.assert_close(found, layer.to_out[0](z), rtol=1e-5, atol=1e-6)


def test_strength_zero_and_self_attention_change_nothing(layer):
    x, positive, negative = draws(3, 5, 8), draws(3, 4, 6, seed=1), draws(3, 7, 6, seed=2)
    plain = layer(x, encoder_hidden_states=positive)
    assert torch.equal(layer(x, encoder_hidden_states=positive, negative=negative, strength=torch.zeros(3)), plain)
    alone = Attention(8, heads=2, dim_head=4).eval()
    expected = alone(x)
    alone.set_processor(NegativeAttention(alone.processor))
    assert torch.equal(alone(x, negative=negative, strength=torch.ones(3)), expected)


def test_the_same_prompt_on_both_sides_scales_what_attention_adds(layer):
    x, text = draws(3, 5, 8), draws(3, 4, 6, seed=1)
    found = layer(x, encoder_hidden_states=text, negative=text, strength=torch.full((3,), 0.3))
    torch.testing.assert_close(found, layer.to_out[0](0.7 * by_hand(layer, x, text)), rtol=1e-5, atol=1e-6)


def told(model, count, strength, negative="a dog"):
    states = as_negative(model.encode_prompts([negative])).expand(count)
    return {**states, STRENGTH: torch.as_tensor(strength).expand(count)}


def test_a_unet_reads_the_condition_and_samples_stay_apart(tiny_sd_v):
    model = open_model(tiny_sd_v)
    install_negative_attention(model.denoiser.network)
    condition = model.encode_prompts(["red cat", "a dog"])
    x_t, t = draws(2, 4, 8, 8), 500
    plain = model.denoiser(x_t, t, condition).output
    zero = model.denoiser(x_t, t, condition.replace(**told(model, 2, 0.0))).output
    assert torch.equal(plain, zero)
    one = model.denoiser(x_t, t, condition.replace(**told(model, 2, [0.0, 0.8]))).output
    # A batch of another size may round differently, this one may not differ at all.
    assert torch.equal(one[0], plain[0]) and not torch.equal(one[1], plain[1])


def test_joint_attention_by_hand():
    """Image queries read image and prompt, less what they would read from the negative tokens; texts stay apart."""
    torch.manual_seed(0)
    layer = Attention(
        8, heads=2, dim_head=4, added_kv_proj_dim=8, out_dim=8, context_pre_only=False, bias=True,
        processor=JointAttnProcessor2_0(), qk_norm="rms_norm",
    ).eval()  # fmt: skip
    image, positive, negative = draws(3, 5, 8), draws(3, 4, 8, seed=1), draws(3, 6, 8, seed=2)
    strength = torch.tensor([0.0, 0.4, 1.2])
    plain, text = layer(image, encoder_hidden_states=positive)
    _, other = layer(image, encoder_hidden_states=negative)
    layer.set_processor(NegativeJointAttention(layer.processor))
    both = torch.cat([positive, negative], 1)
    found, texts = layer(image, encoder_hidden_states=both, tokens=4, strength=strength)

    def heads(x, norm=None):
        x = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return norm(x) if norm else x

    query = heads(layer.to_q(image), layer.norm_q)
    keys = torch.cat(
        [heads(layer.to_k(image), layer.norm_k), heads(layer.add_k_proj(negative), layer.norm_added_k)], 2
    )
    weights = (query @ keys.transpose(-1, -2) / 2).softmax(-1)[..., 5:]
    away = (weights @ heads(layer.add_v_proj(negative))).transpose(1, 2).flatten(2) @ layer.to_out[0].weight.T
    torch.testing.assert_close(found, plain - strength[:, None, None] * away, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0], plain[0])
    torch.testing.assert_close(texts, torch.cat([text, other], 1))


@pytest.mark.parametrize("single", [False, True])
def test_joint_attention_of_flux_by_hand(single):
    """The same with rotary embeddings, in a block of two streams and in one of a single stream."""
    torch.manual_seed(0)
    streams = {"pre_only": True} if single else {"added_kv_proj_dim": 8, "context_pre_only": False}
    layer = FluxAttention(8, heads=2, dim_head=4, out_dim=8, bias=True, **streams).eval()
    image, positive, negative = draws(3, 5, 8), draws(3, 4, 8, seed=1), draws(3, 6, 8, seed=2)
    strength = torch.tensor([0.0, 0.4, 1.2])
    cos, sin = FluxPosEmbed(10, [4])(torch.arange(15.0)[:, None])

    def rope(first, last):
        return tuple(torch.cat([rows[first:last], rows[10:]]) for rows in (cos, sin))

    def attend(text, rotary):
        if not single:
            return layer(image, encoder_hidden_states=text, image_rotary_emb=rotary)
        joined = layer(torch.cat([text, image], 1), image_rotary_emb=rotary)
        return joined[:, text.shape[1] :], joined[:, : text.shape[1]]

    plain, own = attend(positive, rope(0, 4))
    _, other = attend(negative, rope(4, 10))
    layer.set_processor(NegativeJointAttention(layer.processor))
    told = {"tokens": 4, "text": 10, "strength": strength, "image_rotary_emb": (cos, sin)}
    both = torch.cat([positive, negative], 1)
    if single:
        texts, found = layer(torch.cat([both, image], 1), **told).split([10, 5], dim=1)
    else:
        found, texts = layer(image, encoder_hidden_states=both, **told)

    names = ("to_k", "to_v", "norm_k") if single else ("add_k_proj", "add_v_proj", "norm_added_k")
    to_k, to_v, norm_k = (getattr(layer, name) for name in names)

    def heads(x):
        return x.unflatten(-1, (2, 4)).transpose(1, 2)

    query = apply_rotary_emb(layer.norm_q(heads(layer.to_q(image))), rope(0, 0))
    keys = torch.cat([layer.norm_k(heads(layer.to_k(image))), norm_k(heads(to_k(negative)))], 2)
    keys = apply_rotary_emb(keys, tuple(torch.cat([rows[10:], rows[4:10]]) for rows in (cos, sin)))
    weights = (query @ keys.transpose(-1, -2) / 2).softmax(-1)[..., 5:]
    away = (weights @ heads(to_v(negative))).transpose(1, 2).flatten(2)
    away = away if single else away @ layer.to_out[0].weight.T
    torch.testing.assert_close(found, plain - strength[:, None, None] * away, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(texts, torch.cat([own, other], 1))


@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_flux", "tiny_flux_schnell"])
def test_a_joint_transformer_reads_the_condition_and_its_text_stream_stays(family, request):
    model = open_model(request.getfixturevalue(family))
    install_negative_attention(model.denoiser.network)
    condition, x_t = model.encode_prompts(["red cat", "a dog"]), draws(2, 4, 8, 8)
    plain = model.denoiser(x_t, 0.7, condition).output
    assert torch.equal(model.denoiser(x_t, 0.7, condition.replace(**told(model, 2, 0.0))).output, plain)
    one = model.denoiser(x_t, 0.7, condition.replace(**told(model, 2, [0.0, 0.8]))).output
    assert torch.equal(one[0], plain[0]) and not torch.equal(one[1], plain[1])
    remove_negative_attention(model.denoiser.network)
    assert torch.equal(model.denoiser(x_t, 0.7, condition).output, plain)
    options = {"steps": 1, "guidance_scale": 1.0}
    images = generate(model, ["a dog"], negative_prompt="gogh", negative_strength=0.5, **options)
    assert not torch.equal(images, generate(model, ["a dog"], **options))


@torch.no_grad()
def test_padding_of_a_negative_prompt_is_masked_and_its_states_are_projected(tiny_pixart):
    model = open_model(tiny_pixart)
    x_t, condition, negative = draws(2, 4, 8, 8), *(model.encode_prompts(p) for p in (["red cat", "a"], ["gogh"] * 2))
    strength = {STRENGTH: torch.tensor([0.5, 0.0])}
    plain = model.denoiser(x_t, 500, condition).output
    with negative_attention(model.denoiser.network):
        steered = model.denoiser(x_t, 500, condition.replace(**as_negative(negative), **strength)).output
        length = int(negative["text.mask"][0].sum())
        cut = {NEGATIVE: negative["text"][:, :length], MASK: negative["text.mask"][:, :length]}
        again = model.denoiser(x_t, 500, condition.replace(**cut, **strength)).output
        # Away from the prompt itself by all of it: attention adds its bias alone.
        own = {**as_negative(condition), STRENGTH: torch.ones(2)}
        nothing = model.denoiser(x_t, 500, condition.replace(**own)).output
    torch.testing.assert_close(steered, again, rtol=1e-5, atol=1e-6)
    assert torch.equal(steered[1], plain[1]) and not torch.allclose(steered[0], plain[0], atol=1e-3)
    for block in model.denoiser.network.transformer_blocks:
        block.attn2.to_v.weight.zero_()
        block.attn2.to_v.bias.zero_()
    torch.testing.assert_close(nothing, model.denoiser(x_t, 500, condition).output, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["tiny_sd_v", "tiny_sd3", "tiny_flux", "tiny_pixart"])
def test_adapters_of_the_output_projection_are_part_of_it(family, request):
    """A LoRA that is merged must steer as it does unmerged."""
    outputs = []
    for merged in (False, True):
        model = open_model(request.getfixturevalue(family))
        network = model.denoiser.network
        torch.manual_seed(0)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_out.0"]), network)
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        for layer in network.modules() if merged else ():
            if isinstance(layer, LoraLayer):
                layer.merge()
        install_negative_attention(network)
        condition = model.encode_prompts(["red cat"]).replace(**told(model, 1, 0.8))
        outputs.append(model.denoiser(draws(1, 4, 8, 8), model.schedule.t_max / 2, condition).output)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["tiny_sd_v", "tiny_sd3", "tiny_sdxl", "tiny_flux", "tiny_pixart"])
def test_it_survives_recomputation_in_the_backward_pass(family, request):
    """Two calls with different negatives before either is differentiated: each must recompute with its own."""

    def gradients(saving):
        model = open_model(request.getfixturevalue(family))
        network = model.denoiser.network.train()
        install_negative_attention(network)
        if saving:
            network.enable_gradient_checkpointing()
        network.requires_grad_(True)
        condition, x_t = model.encode_prompts(["red cat"]), draws(1, 4, 8, 8)
        losses = [
            model.denoiser(x_t, model.schedule.t_max / 2, condition.replace(**told(model, 1, strength, text)))
            .output.square()
            .mean()
            for strength, text in ((0.5, "a dog"), (0.9, "van gogh"))
        ]
        sum(losses).backward()
        return [p.grad for p in network.parameters() if p.grad is not None]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_removal_gives_back_the_processors_and_the_output(tiny_sd):
    model = open_model(tiny_sd)
    network, condition, x_t = model.denoiser.network, model.encode_prompts(["red cat"]), draws(1, 4, 8, 8)
    before, processors = model.denoiser(x_t, 500, condition).output, list(network.attn_processors.values())
    with negative_attention(network):
        assert takes_negatives(network)
        with negative_attention(network):
            assert takes_negatives(network)
        assert takes_negatives(network)
    assert not takes_negatives(network)
    assert list(network.attn_processors.values()) == processors
    assert torch.equal(model.denoiser(x_t, 500, condition).output, before)
    install_negative_attention(network)
    with pytest.raises(ValueError, match="reads negative prompts already"):
        install_negative_attention(network)
    remove_negative_attention(network)
    assert list(network.attn_processors.values()) == processors


class Operators(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sd3", "tiny_flux"])
@pytest.mark.parametrize("kernel", ["math", "eager"])
def test_it_runs_with_a_chosen_kernel_and_no_other(family, kernel, request):
    model = open_model(request.getfixturevalue(family))
    t = model.schedule.t_max / 2
    set_attention(model, kernel)
    with negative_attention(model.denoiser.network):
        condition = model.encode_prompts(["red cat"]).replace(**told(model, 1, 0.5))
        with torch.no_grad(), Operators() as operators:
            found = model.denoiser(draws(1, 4, 8, 8), t, condition).output
        assert not any("flash" in name or "efficient" in name for name in operators.names)
        with pytest.raises(ValueError, match="before what reads negative prompts"):
            set_attention(model, "sdpa")
    set_attention(model, "auto")
    with negative_attention(model.denoiser.network):
        expected = model.denoiser(draws(1, 4, 8, 8), t, condition).output
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_generate_steers_a_student_that_is_not_guided(tiny_sd_v):
    model, prompts = open_model(tiny_sd_v), ["red cat", "a dog"]
    options = {"sampler": "one_step", "guidance_scale": 1.0}
    plain = generate(model, prompts, **options)
    assert torch.equal(generate(model, prompts, negative_prompt="gogh", negative_strength=0.0, **options), plain)
    steered = generate(model, prompts, negative_prompt="gogh", negative_strength=0.5, **options)
    assert not torch.equal(steered, plain)
    one = generate(model, prompts, negative_prompt="gogh", negative_strength=0.5, batch_size=1, **options)
    torch.testing.assert_close(steered, one, rtol=1e-4, atol=1e-5)
    assert not takes_negatives(model.denoiser.network)


def test_misuse_is_named(tiny_sd_v, tiny_unconditional):
    model = open_model(tiny_sd_v)
    condition = model.encode_prompts(["red cat"])
    with pytest.raises(ValueError, match="cannot read a negative prompt"):
        model.denoiser(draws(1, 4, 8, 8), 500, condition.replace(**told(model, 1, 0.5)))
    alone = {NEGATIVE: condition["text"]}, {STRENGTH: torch.ones(1)}
    for told_badly in (*alone, {NEGATIVE: condition["text"], STRENGTH: torch.ones(1, 1)}):
        with negative_attention(model.denoiser.network), pytest.raises(ValueError, match="one number per sample"):
            model.denoiser(draws(1, 4, 8, 8), 500, condition.replace(**told_badly))
    for strength in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength of a negative prompt cannot be"):
            generate(model, ["a dog"], guidance_scale=1.0, negative_prompt="gogh", negative_strength=strength)
    with pytest.raises(ValueError, match=r"set guidance_scale to 1, not 7\.5"):
        generate(model, ["a dog"], negative_prompt="gogh", negative_strength=0.5)
    with pytest.raises(ValueError, match="give one, or leave it out"):
        generate(model, ["a dog"], guidance_scale=1.0, negative_strength=0.5)
    with pytest.raises(ValueError, match="has no cross-attention"):
        install_negative_attention(open_model(tiny_unconditional).denoiser.network)
    with pytest.raises(ValueError, match="cannot use the condition's"):
        open_model(tiny_unconditional).denoiser(draws(1, 3, 8, 8), 500, Condition(negative=draws(1, 2)))


def test_fused_projections_are_refused(tiny_sd3):
    network = open_model(tiny_sd3).denoiser.network
    network.fuse_qkv_projections()
    with pytest.raises(ValueError, match="does not fit fused projections"):
        install_negative_attention(network)
