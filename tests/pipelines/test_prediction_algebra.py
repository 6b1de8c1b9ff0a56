"""What each family's prediction is, against its network called directly."""

from __future__ import annotations

import pytest
import torch
from opened import Opened, draw

from sublimate.pipelines.model import Model


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> dict[str, Model]:
    return Opened(request)


@torch.no_grad()
def test_epsilon_algebra(models):
    model = models["tiny_sd"]
    x_t, t, condition = draw(model)
    eps = model.pipeline.unet(x_t, t.long(), encoder_hidden_states=condition["text"]).sample
    level = model.pipeline.scheduler.alphas_cumprod[t.long()].view(-1, 1, 1, 1)
    prediction = model.denoiser(x_t, t, condition)
    torch.testing.assert_close(prediction.eps, eps, atol=0, rtol=0)
    torch.testing.assert_close(prediction.x0, (x_t - (1 - level).sqrt() * eps) / level.sqrt(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_v_algebra(models):
    model = models["tiny_sd_v"]
    x_t, t, condition = draw(model)
    v = model.pipeline.unet(x_t, t.long(), encoder_hidden_states=condition["text"]).sample
    level = model.pipeline.scheduler.alphas_cumprod[t.long()].view(-1, 1, 1, 1)
    x0 = level.sqrt() * x_t - (1 - level).sqrt() * v
    torch.testing.assert_close(model.denoiser(x_t, t, condition).x0, x0, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_flow_algebra(models):
    model = models["tiny_sd3"]
    x_t, t, condition = draw(model)
    velocity = model.pipeline.transformer(
        hidden_states=x_t,
        timestep=1000 * t.float(),
        encoder_hidden_states=condition["text"],
        pooled_projections=condition["text.pooled"],
    ).sample
    x0 = x_t - t.float().view(-1, 1, 1, 1) * velocity
    torch.testing.assert_close(model.denoiser(x_t, t, condition).x0, x0, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_edm_preconditioning(models):
    # Karras et al. 2022, table 1, with the consistency models' time 1000 c_noise.
    model = models["tiny_edm"]
    x_t, sigma, _ = draw(model)
    s = sigma.float().view(-1, 1, 1, 1)
    x_t = s * x_t
    f = model.pipeline.unet(x_t / (s**2 + 0.25).sqrt(), 250 * sigma.log().float()).sample
    x0 = 0.25 / (s**2 + 0.25) * x_t + s * 0.5 / (s**2 + 0.25).sqrt() * f
    torch.testing.assert_close(model.denoiser(x_t, sigma).x0, x0, atol=1e-5, rtol=1e-5)
