"""An edited UNet in the other stock pipelines that can be made of a model's parts."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import pytest
import torch
from diffusers import ControlNetModel

from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.export import save_model
from sublimate.pipelines.model import Model, open_model

PREFIXES = {"tiny_sd": "StableDiffusion", "tiny_sdxl": "StableDiffusionXL"}
CALL = {"prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}


def made_of(model: Model, kind: str, **more) -> Callable[..., torch.Tensor]:
    """The stock pipeline of that kind, with the parts of the model's own."""
    family = type(model.pipeline).__name__.removesuffix("Pipeline")
    options = {} if "XL" in family else {"requires_safety_checker": False}
    pipeline = getattr(diffusers, f"{family}{kind}Pipeline")(**model.pipeline.components, **options, **more)
    pipeline.set_progress_bar_config(disable=True)
    return lambda **call: pipeline(**CALL, **call, generator=torch.Generator().manual_seed(3)).images


def picture() -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def from_image(model: Model) -> torch.Tensor:
    return made_of(model, "Img2Img")(image=picture(), strength=0.8)


def inpainted(model: Model) -> torch.Tensor:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:, :] = 1
    return made_of(model, "Inpaint")(image=picture(), mask_image=mask, strength=0.99)


def controlled(model: Model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    network = ControlNetModel.from_unet(model.pipeline.unet, conditioning_embedding_out_channels=(8, 16))
    for layer in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.1, generator=generator)
    return made_of(model, "ControlNet", controlnet=network.eval())(image=picture())


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("draw", [from_image, inpainted, controlled])
@pytest.mark.parametrize("name", PREFIXES)
def test_edits_hold_in_other_stock_pipelines(request, tmp_path, name, draw):
    model = open_model(request.getfixturevalue(name))
    edit = UCE(lam=1e-3).fit(model, Request(Concept("cat", anchor="dog")), seed=0)
    # An untrained control network of the unedited one: its own copy of the text layers is not the edit's business.
    torch.manual_seed(0)
    before = draw(model)
    edit.apply(model)
    edited = draw(model)
    assert float((edited - before).abs().max()) > 1e-3
    folded = draw(open_model(save_model(model, tmp_path / "edited")))
    torch.testing.assert_close(folded, edited, atol=1e-5, rtol=0)
    edit.remove(model)
    assert torch.equal(draw(model), before)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", PREFIXES)
def test_a_silent_control_network_leaves_the_edited_model(request, name):
    model = open_model(request.getfixturevalue(name))
    with UCE(lam=1e-3).fit(model, Request(Concept("cat", anchor="dog")), seed=0).applied(model):
        # Fresh from `from_unet` its outputs are zero.
        network = ControlNetModel.from_unet(model.pipeline.unet, conditioning_embedding_out_channels=(8, 16))
        drawn = made_of(model, "ControlNet", controlnet=network)(image=picture())
        torch.testing.assert_close(drawn, made_of(model, "")(), atol=1e-6, rtol=0)
