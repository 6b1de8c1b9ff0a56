"""The attention kernel that was asked for is the one that runs, or the model stays as it was."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from opened import Opened

from sublimate.pipelines.attention import KERNELS, _attention, attention_report, set_attention
from sublimate.pipelines.model import Model

FAMILIES = (
    "tiny_sd",
    "tiny_unconditional",
    "tiny_edm_classes",
    "tiny_dit",
    "tiny_sd3",
    "tiny_sdxl",
    "tiny_flux",
    "tiny_pixart",
    "tiny_sana",
)


@pytest.fixture
def models(request: pytest.FixtureRequest) -> dict[str, Model]:
    return Opened(request)


def output(model: Model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn((1, *model.latent_shape), generator=generator)
    return model.denoiser(x_t, model.schedule.t_max, model.any_condition()).output


def processors(model: Model) -> list[str]:
    return [type(m.processor).__name__ for m in model.denoiser.network.modules() if hasattr(m, "set_processor")]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_kernel_that_ran_is_reported(models, name):
    model = models[name]
    expected = output(model)
    for kernel, ran in (("auto", "flash"), ("sdpa", "flash"), ("flash", "flash"), ("math", "math"), ("auto", "flash")):
        report = set_attention(model, kernel)
        assert (report.requested, report.kernel) == (kernel, ran)
        assert attention_report(model).kernels == report.kernels
        torch.testing.assert_close(output(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_report_names_the_processors(models):
    assert set_attention(models["tiny_sd"], "math").kernels == {"AttnProcessor2_0": ("math",)}
    assert set_attention(models["tiny_sd3"], "math").kernels == {"JointAttnProcessor2_0": ("math",)}
    assert set_attention(models["tiny_flux"], "math").kernels == {"FluxAttnProcessor": ("math",)}
    # Linear attention has no softmax: the choice is for attention to text alone.
    expected = {"SanaAttnProcessor2_0": ("math",), "SanaLinearAttnProcessor2_0": ()}
    assert set_attention(models["tiny_sana"], "math").kernels == expected
    assert sorted(processors(models["tiny_sana"])) == [*2 * ["ChosenProcessor"], *2 * ["SanaLinearAttnProcessor2_0"]]


@pytest.mark.slow
def test_a_kernel_is_chosen_over_diffusers_own_choice_of_a_backend(models):
    model = models["tiny_flux"]
    model.denoiser.network.set_attention_backend("_native_math")
    assert attention_report(model).kernel == set_attention(model, "auto").kernel == "math"
    for kernel, ran in (("sdpa", "flash"), ("eager", "eager"), ("auto", "math")):
        assert set_attention(model, kernel).kernel == ran
    assert {m.processor._attention_backend for m in model.denoiser.network.modules() if hasattr(m, "processor")} == {
        "_native_math"
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_eager_attention_allows_forward_mode_derivatives(models, name):
    model = models[name].to(dtype=torch.float64)
    model.denoiser.double()
    generator = torch.Generator().manual_seed(0)
    x_t, v = torch.randn((2, 1, *model.latent_shape), generator=generator, dtype=torch.float64)
    t, condition = model.schedule.t_max / 2, model.any_condition()

    def network(x: torch.Tensor) -> torch.Tensor:
        return model.denoiser(x, t, condition).output

    expected = network(x_t)
    assert set_attention(model, "eager").kernel == "eager"
    torch.testing.assert_close(network(x_t), expected, atol=1e-6, rtol=1e-6)
    _, tangent = torch.func.jvp(network, (x_t,), (v,))
    if name == "tiny_sana":
        # Its linear attention computes in float32 and has kinks, so finite differences say little: u J v both ways.
        u = torch.randn(tangent.shape, generator=generator, dtype=torch.float64)
        (product,) = torch.autograd.grad(network(x_t.requires_grad_()), x_t, u)
        torch.testing.assert_close((u * tangent).sum(), (product * v).sum(), atol=1e-4, rtol=1e-4)
    else:
        h = 1e-3  # rotary embeddings are applied in float32, whatever the network's precision
        difference = (network(x_t + h * v) - network(x_t - h * v)) / (2 * h)
        torch.testing.assert_close(tangent, difference, atol=1e-5, rtol=1e-5)
    assert set_attention(model, "auto").kernel in ("flash", "math")


def test_eager_attention_is_torchs():
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    reference = torch.nn.functional.scaled_dot_product_attention
    masks = (None, torch.rand(5, 5) > 0.4, torch.randn(2, 1, 5, 5))
    for mask in masks:
        if mask is not None and mask.dtype == torch.bool:
            mask |= torch.eye(5, dtype=torch.bool)
        for scale in (None, 0.3):
            expected = reference(q, k, v, attn_mask=mask, scale=scale)
            torch.testing.assert_close(_attention(q, k, v, mask, scale=scale), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="causal"):
        _attention(q, k, v, is_causal=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kernel", ["efficient", "cudnn"])
def test_a_kernel_that_does_not_run_here_is_an_error_and_changes_nothing(models, name, kernel):
    model = models[name]
    set_attention(model, "math")
    before = processors(model)
    with pytest.raises(ValueError, match=rf"kernel '{kernel}' does not run here on cpu"):
        set_attention(model, kernel)
    assert processors(model) == before
    assert attention_report(model).kernel == "math"


def test_xformers_is_an_extra(models):
    if importlib.util.find_spec("xformers") is None:
        message = r"xformers is not installed: pip install 'sublimate\[xformers\]'"
    else:
        message = "no kernels for cpu"
    with pytest.raises(ValueError, match=message):
        set_attention(models["tiny_sd"], "xformers")


def test_an_option_that_is_ignored_is_an_error(models):
    # Joint attention that runs something else than what was asked for must not go unnoticed.
    model = models["tiny_sd3"]

    class Stubborn:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
            query, key = attn.to_q(hidden_states), attn.to_k(hidden_states)
            mixed = attn.to_out[0]((query @ key.transpose(1, 2)).softmax(-1) @ attn.to_v(hidden_states))
            return mixed, encoder_hidden_states

    for module in model.denoiser.network.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(Stubborn())
    with pytest.raises(ValueError, match="'flash' attention was asked for, but Stubborn ran eager"):
        set_attention(model, "flash")
    assert set(processors(model)) == {"Stubborn"}


def test_an_unknown_kernel_is_named_with_the_known_ones(models):
    with pytest.raises(ValueError, match=f"no attention kernel 'fast'; use one of {', '.join(KERNELS)}"):
        set_attention(models["tiny_sd"], "fast")


def test_watching_leaves_no_hooks_and_players_inherit(models):
    model = models["tiny_sd"]
    set_attention(model, "math")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.denoiser.modules())
    player = copy.deepcopy(model.denoiser)
    assert {type(p).__name__ for p in player.network.attn_processors.values()} == {"ChosenProcessor"}


def test_a_chosen_kernel_survives_gradient_checkpointing(models):
    model = models["tiny_sd"]
    model.denoiser.requires_grad_(True)

    def gradient() -> torch.Tensor:
        model.denoiser.zero_grad()
        output(model).square().mean().backward()
        return model.denoiser.network.conv_in.weight.grad.clone()

    expected = gradient()
    set_attention(model, "math")
    model.denoiser.train()
    model.denoiser.network.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), expected, atol=1e-5, rtol=1e-4)
