"""Quantised bases: what they hold stays, LoRAs train over them, and nothing else does."""

import json
import shutil

import pytest
import torch
from quantised import KINDS, quantise

from sublimate.erasure.methods.esd import ESD
from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Request
from sublimate.pipelines.edit import Edit
from sublimate.pipelines.model import Model, open_model
from sublimate.pipelines.quantised import is_quantised, plain_tensors
from sublimate.pipelines.shapes import open_shapes
from sublimate.training.parking import park
from sublimate.training.players import PlayerConfig, make_player, shared_copy

LORA = PlayerConfig(kind="lora", rank=2)


@pytest.fixture(params=KINDS)
def model(request, tiny_sd_v):
    opened = open_model(tiny_sd_v)
    quantise(opened.pipeline.unet, request.param)
    return Model(opened.pipeline, opened.source, opened.defaults)


def layer_of(model):
    """The name of a quantised layer."""
    return next(name for name, _ in model.pipeline.unet.named_modules() if name.endswith(".to_q"))


def bits(module):
    named = (pair for key, p in module.named_parameters() for pair in plain_tensors(key, p.detach()))
    return {name: tensor.flatten().view(torch.uint8).numpy().tobytes() for name, tensor in named}


def predict(model, denoiser):
    return denoiser(torch.ones(2, *model.latent_shape), 500.0, model.encode_prompts(["a cat"])).output


def test_precision_is_that_of_the_other_weights(model):
    before = bits(model.denoiser)
    assert model.dtype == torch.float32
    model.to(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    after = bits(model.denoiser)
    kept = [n for key, p in model.denoiser.named_parameters() if is_quantised(p) for n, _ in plain_tensors(key, p)]
    assert kept and all(before[name] == after[name] for name in kept)
    assert all(p.dtype == torch.bfloat16 for p in model.denoiser.parameters() if not is_quantised(p))


def test_a_copy_shares_all_that_a_quantised_layer_holds(model):
    twin, name = shared_copy(model.denoiser), f"network.{layer_of(model)}"
    own, copied = (network.get_submodule(name) for network in (model.denoiser, twin))
    assert own is not copied and own.weight is copied.weight
    if hasattr(own, "state"):
        assert own.state.codes is copied.state.codes and own.state.scale is copied.state.scale
    torch.testing.assert_close(predict(model, twin), predict(model, model.denoiser))


@pytest.mark.slow
def test_a_lora_trains_over_it_in_float32_and_it_keeps_every_bit(model):
    before, hashed = bits(model.denoiser), model.content_hash()
    player = make_player(model.denoiser, LORA)
    assert {p.dtype for p in player.trainable().values()} == {torch.float32}
    optimizer = player.optimizer()
    player.set_trainable(True)
    said = []
    for _ in range(3):
        loss = predict(model, player.module).square().mean()
        loss.backward()
        said.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert said[2] < said[0]
    assert bits(model.denoiser) == before and model.content_hash() == hashed


def test_the_hash_covers_the_codes(model):
    before, layer = model.content_hash(), model.pipeline.unet.get_submodule(layer_of(model))
    codes = getattr(layer.weight, "codes", layer.weight.data)
    codes[0, 0] ^= 1
    assert model.content_hash() != before


def test_whatever_would_change_it_is_refused(model):
    layer = layer_of(model)
    with pytest.raises(ValueError, match=r"Training changes network\..*, which is quantised: open a checkpoint"):
        make_player(model.denoiser, PlayerConfig())
    with pytest.raises(ValueError, match=r"Training changes .*quantised"):
        ESD(max_train_steps=1).fit(model, Request("cat"))
    with pytest.raises(ValueError, match=r"A closed form changes .*quantised"):
        UCE().fit(model, Request("cat"))
    weight = model.pipeline.unet.get_submodule(layer).weight
    edit = Edit({f"unet/{layer}.weight": torch.zeros(weight.shape)})
    before = bits(model.denoiser)
    with pytest.raises(ValueError, match=r"The edit changes .*quantised"):
        edit.apply(model, allow_other_base=True)
    assert bits(model.denoiser) == before


def test_what_is_not_quantised_trains(model):
    player = make_player(model.denoiser, PlayerConfig(), names=["network.conv_in.weight"])
    assert list(player.trainable()) == ["network.conv_in.weight"]


def test_a_quantised_encoder_is_not_parked(tiny_sd_v, tmp_path):
    model = open_model(tiny_sd_v)
    encoder = model.pipeline.text_encoder
    layer = encoder.get_submodule(next(n for n, m in encoder.named_modules() if n.endswith("mlp.fc1")))
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    park(model, ["text_encoder"], tmp_path / "parked", file_bytes=20000)
    assert not (tmp_path / "parked").exists()


def test_a_folder_that_cannot_be_opened_here_says_why(tiny_sd_v, tmp_path):
    folder = shutil.copytree(tiny_sd_v, tmp_path / "quantised")
    file = folder / "unet" / "config.json"
    for method in ("torchao", "bitsandbytes"):
        how = {"quant_method": method, "load_in_8bit": True, "quant_type": "int8wo"}
        file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": how}))
        with pytest.raises(ValueError, match="cannot be opened as a StableDiffusionPipeline"):
            open_model(folder)
    with pytest.raises(ValueError, match="is quantised"):
        open_shapes(folder)
