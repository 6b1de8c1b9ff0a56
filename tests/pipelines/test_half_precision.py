"""Half precision: text encoders keep in float32 what transformers keeps, wherever precision is given."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import T5EncoderModel

from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
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
