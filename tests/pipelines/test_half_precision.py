"""Half precision: what stays, or runs, in float32 as in stock pipelines."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import T5EncoderModel

from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.autoencoders import exact
from sublimate.pipelines.export import save_model
from sublimate.pipelines.model import Model, open_model
from sublimate.pipelines.shapes import open_shapes

HALVES = (torch.float16, torch.bfloat16)


def precisions(network: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in (*network.named_parameters(), *network.named_buffers())}


def t5(model: Model) -> torch.nn.Module:
    return model.pipeline.text_encoder_3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("attribute", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_precision_is_that_of_transformers(tiny_sd3, monkeypatch, attribute, dtype):
    for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        monkeypatch.setattr(T5EncoderModel, name, ["wo"] if name == attribute else None)
    expected = precisions(T5EncoderModel.from_pretrained(tiny_sd3 / "text_encoder_3", dtype=dtype))
    assert len(set(expected.values())) == (1 if attribute.endswith("modules") and dtype == torch.bfloat16 else 2)
    model = open_model(tiny_sd3, dtype=dtype)
    assert precisions(t5(model)) == expected
    assert set(precisions(model.pipeline.transformer).values()) == {dtype}
    moved = open_model(tiny_sd3)
    assert precisions(t5(moved.to(dtype=dtype))) == expected
    assert moved.content_hash() == model.content_hash()
    assert precisions(t5(open_shapes(tiny_sd3, dtype=dtype))) == expected
    assert set(precisions(t5(model.to(dtype=torch.float32))).values()) == {torch.float32}


@pytest.mark.slow
@torch.no_grad()
def test_prompts_in_float16_are_those_of_the_stock_pipeline(tiny_sd3):
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_sd3, dtype=torch.float16)
    expected = stock.encode_prompt("a cat", None, None, do_classifier_free_guidance=False, max_sequence_length=256)[0]
    said = open_model(tiny_sd3, dtype=torch.float16).encode_prompts(["a cat"])["text"]
    assert said.dtype == torch.float16 and torch.equal(said, expected)


@pytest.mark.slow
def test_an_edit_made_in_float16_fits_the_checkpoint_in_either_precision(tiny_sd3, tmp_path):
    half, whole = open_model(tiny_sd3, dtype=torch.float16), open_model(tiny_sd3)
    edit = UCE(lam=1e-3).fit(half, Request(Concept("cat", anchor="dog")), seed=0)
    for model in (half, whole):
        before = model.content_hash()
        with edit.applied(model):
            assert model.content_hash() != before
        assert model.content_hash() == before
    again = open_model(save_model(half, tmp_path / "saved"), dtype=torch.float16)
    assert again.content_hash() == half.content_hash()


@pytest.fixture(params=["tiny_sdxl", "tiny_upscaling"])
def upcast(request):
    """A model whose autoencoder overflows in float16."""
    return open_model(request.getfixturevalue(request.param), dtype=torch.float16)


@torch.no_grad()
@pytest.mark.slow
def test_an_autoencoder_that_overflows_runs_in_float32(upcast):
    vae, x0 = upcast.pipeline.vae, torch.randn(1, *upcast.latent_shape, dtype=torch.float16)
    image = torch.rand(1, 3, 16, 16, dtype=torch.float16)
    ours, latents = upcast.decode(x0), upcast.encode(image)
    assert ours.dtype == latents.dtype == vae.dtype == torch.float16
    scale = vae.config.scaling_factor
    expected = vae.float().decode(x0.float() / scale).sample / 2 + 0.5
    torch.testing.assert_close(ours, expected.half(), atol=0, rtol=0)
    expected = vae.encode(2 * image.float() - 1).latent_dist.mode() * scale
    torch.testing.assert_close(latents, expected.half(), atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.slow
def test_its_copy_in_float32_is_made_once_for_its_weights_and_options(upcast):
    vae, x0 = upcast.pipeline.vae, torch.randn(1, *upcast.latent_shape, dtype=torch.float16)
    twin, before = exact(vae), upcast.decode(x0)
    assert twin is exact(vae) is not vae
    vae.decoder.conv_out.bias.add_(1)
    assert exact(vae) is not twin
    torch.testing.assert_close(upcast.decode(x0), before + 0.5, atol=2e-3, rtol=1e-3)
    vae.enable_slicing()
    assert exact(vae).use_slicing
    vae.decoder.conv_out.bias.data = torch.zeros_like(vae.decoder.conv_out.bias)
    assert not exact(vae).decoder.conv_out.bias.any()
    kept = weakref.ref(exact(vae))
    assert exact(vae.float()) is vae
    gc.collect()
    assert kept() is None
