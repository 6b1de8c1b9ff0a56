"""Name rules on real networks: what trains, and what is refused."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel

from sublimate.erasure.weights import select
from sublimate.pipelines.model import open_model

BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


@pytest.fixture(scope="module")
def unet():
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        **BLOCKS,
    )


@pytest.fixture(scope="module")
def sd3():
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def endings(names):
    """What remains of names after the attention module's own."""
    return {name.rpartition(".attn")[2].partition(".")[2] for name in names}


def test_rules_of_a_cross_attention_unet(unet):
    names = {name for name, _ in unet.named_parameters()}
    x = select(unet, "x")
    assert x == {name for name in names if ".attn2." in name}
    assert endings(x) == {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"}
    assert endings(select(unet, "x-strict")) == {"to_k.weight", "to_v.weight"}
    assert select(unet, "x-strict") < x
    assert select(unet, "self") == {name for name in names if ".attn1." in name}
    left_out = names - select(unet, "u")
    assert left_out == x | {n for n in names if n.startswith(("conv_out.", "conv_norm_out.", "time_embedding."))}
    assert select(unet, "full") == names


def test_x_trains_no_norms(sd3):
    with torch.device("meta"):
        pixart = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, num_layers=1, cross_attention_dim=8, caption_channels=8
        )
    assert endings(select(pixart, "x-strict")) == {f"to_{p}.{q}" for p in "kv" for q in ("weight", "bias")}
    assert not any("norm" in name for name in select(sd3, "x") | select(sd3, "self"))


def test_joint_attention_trains_the_text_streams_projections(sd3):
    x = select(sd3, "x")
    assert {name.rpartition(".attn.")[2].rpartition(".")[0] for name in x} == {
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    }
    strict = {name.rpartition(".")[0].rpartition(".")[2] for name in select(sd3, "x-strict")}
    assert strict == {"add_k_proj", "add_v_proj"}
    # SD3 calls a second self-attention of the image attn2: it is no cross-attention.
    assert any(".attn2.to_q." in name for name in select(sd3, "self"))
    u = select(sd3, "u")
    assert any(".attn.to_q." in name for name in u) and any(".ff.net." in name for name in u)
    assert not [n for n in u if "context" in n or "add_" in n or n.startswith(("proj_out", "norm_out", "time_text"))]


@pytest.mark.parametrize("name", ["tiny_pixart", "tiny_sana"])
def test_u_leaves_out_what_prepares_text_and_time_in_transformers(request, name):
    network = open_model(request.getfixturevalue(name)).denoiser.network
    names = {name for name, _ in network.named_parameters()}
    left = {name.partition(".")[0] for name in names - select(network, "u")} - {"transformer_blocks"}
    assert left >= {"proj_out", "caption_projection", "scale_shift_table"} and left & {"adaln_single", "time_embed"}
    assert {n for n in names - select(network, "u") if n.startswith("transformer_blocks")} == select(network, "x") | {
        n for n in names if ".attn2." in n
    }


@pytest.mark.slow
def test_an_attn2_that_attends_to_itself_is_self_attention(tiny_audio):
    model = open_model(tiny_audio)
    network = model.denoiser.network
    layers = {name: module for name, module in network.named_modules() if name.endswith(".attn2")}
    told = {name for name, layer in layers.items() if layer.is_cross_attention}
    assert {name.partition(".attn2.")[0] + ".attn2" for name in select(network, "x")} == told < set(layers)
    assert {f"{n}.to_q.weight" for n in set(layers) - told} <= select(network, "self") & select(network, "u")


def test_a_network_without_text_has_no_cross_attention():
    network = UNet2DModel(
        sample_size=8, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **BLOCKS
    )
    for rule in ("x", "x-strict", "self"):
        with pytest.raises(ValueError, match=f"UNet2DModel has no weights of the rule '{rule}'"):
            select(network, rule)
    assert select(network, "u")


def test_unknown_rules_are_refused(unet):
    with pytest.raises(ValueError, match="no weights rule 'xattn'"):
        select(unet, "xattn")
