"""Training of discriminator guidance: its times, what it learns, and what it exports."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.denoisers import Denoiser
from sublimate.diffusion.mixtures import GaussianMixture
from sublimate.diffusion.predictions import Parametrization
from sublimate.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow
from sublimate.pipelines import discriminator_guidance as sampling
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.training.distill import DistillConfig, distill
from sublimate.training.objective import Batch, Turn
from sublimate.training.objectives.discriminator_guidance import DiscriminatorGuidance, DiscriminatorGuidanceConfig
from sublimate.training.randomness import SampleRandom

TURN = Turn("discriminator", ("discriminator",))


def make(schedule, **options):
    torch.manual_seed(0)
    waves = torch.randn(2, 24)

    def call(network, x, t, condition, features):
        inner = torch.cat([x, t[:, None]], 1) @ waves
        return network(x), {name: torch.cat([inner.sin(), inner.cos()], 1)[:, None] for name in features}

    denoiser = Denoiser(nn.Linear(1, 1), call, schedule, Parametrization("edm"))
    model = SimpleNamespace(
        denoiser=denoiser,
        latent_shape=(1,),
        null_condition=Condition,
        any_condition=Condition,
        feature_taps=lambda: ("waves",),
    )
    return DiscriminatorGuidance(model, DiscriminatorGuidanceConfig(**options))


def batch(size, real=None, fake=None):
    tensors = {"images": torch.zeros(size, 1) if real is None else real}
    tensors["samples"] = torch.zeros(size, 1) if fake is None else fake
    return Batch(Condition(), SampleRandom(0, 0, "discriminator", range(size)), tensors)


def test_times_have_the_papers_density():
    """d/dt [log(1 - exp(-B)) + B] for B = t^2 (b1 - b0)/2 + t b0, the linear variance-preserving process."""
    n = 4000
    beta = torch.linspace(0.1, 20, n).double() / n
    objective = make(DiscreteVP(torch.cumprod(1 - beta, 0)), time_range=(0.0, 1.0))
    drawn = (objective.prepare(TURN, batch(4000), 0)["t"] + 1) / n

    def cumulative(t):
        integral = t**2 * (20 - 0.1) / 2 + t * 0.1
        return torch.log(-torch.expm1(-integral)) + integral

    ends = cumulative(torch.tensor([1 / n, 1.0]).double())
    u = ((cumulative(drawn) - ends[0]) / (ends[1] - ends[0])).sort().values
    # Kolmogorov-Smirnov: 1.63/sqrt(n) is the 1 % point.
    assert (u - (torch.arange(4000) + 0.5) / 4000).abs().max() < 1.63 / math.sqrt(4000)


def test_schedules_that_end_in_pure_noise_are_cut_off():
    objective = make(RectifiedFlow())
    t = objective.prepare(TURN, batch(500), 0)["t"]
    assert bool(torch.isfinite(t).all()) and float(t.max()) <= 80 / 81 + 1e-9
    assert float(t.min()) < 0.1


@pytest.mark.slow
def test_the_discriminator_learns_the_log_ratio_at_every_level():
    def normal(mean, std):
        return GaussianMixture(torch.ones(1), torch.tensor([[mean]]), torch.tensor([std]))

    data, model = normal(0.5, 0.7), normal(0.0, 1.0)
    objective = make(EDM(0.3, 3.0), discriminator_width=48)
    player = objective.players()["discriminator"]
    player.set_trainable(True)
    optimizer = torch.optim.Adam(player.trainable().values(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(900):
        random = SampleRandom(0, step, "discriminator", range(256))
        tensors = {"images": data.sample(256, generator), "samples": model.sample(256, generator)}
        drawn = Batch(Condition(), random, tensors)
        optimizer.zero_grad()
        objective.loss(TURN, objective.prepare(TURN, drawn, step), step).total.backward()
        optimizer.step()
    x = torch.linspace(-1.0, 1.5, 26)[:, None]
    for level in (0.4, 1.0, 2.0):
        t = torch.full((26,), level)
        learnt = player.module(objective.model(x, t, features=objective.taps), t).mean(1)
        exact = data.marginal(1.0, level).log_prob(x) - model.marginal(1.0, level).log_prob(x)
        assert (learnt - exact).abs().mean() < 0.1, level


def test_the_logit_is_positive_for_images():
    objective = make(EDM(0.3, 3.0))
    player = objective.players()["discriminator"]
    player.set_trainable(True)
    optimizer = torch.optim.Adam(player.trainable().values(), lr=3e-3)
    for step in range(40):
        drawn = batch(64, torch.full((64, 1), 3.0), torch.full((64, 1), -3.0))
        optimizer.zero_grad()
        objective.loss(TURN, objective.prepare(TURN, drawn, step), step).total.backward()
        optimizer.step()
    t = torch.full((1,), 0.3)
    assert player.module(objective.model(torch.full((1, 1), 3.0), t, features=objective.taps), t) > 1


@pytest.mark.slow
def test_it_trains_exports_and_corrects_a_stable_diffusion(tiny_sd_v, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na dog\n")
    config = DistillConfig(
        model=str(tiny_sd_v),
        method="discriminator_guidance",
        objective={"discriminator_width": 8, "guidance_scale": 2.0, "boosting": True},
        data={"prompts": str(prompts), "images": "teacher", "teacher_steps": 2},
        trainer={"output_dir": tmp_path / "run", "max_train_steps": 2, "train_batch_size": 2},
    )
    folder = distill(config, progress=False)
    model = open_model(tiny_sd_v)
    plain = generate(model, ["a dog"], steps=3, guidance_scale=2.0, sampler="heun")
    guided = sampling.DiscriminatorGuidance.load(model, folder, log_snr_max=math.inf)
    assert (guided.guidance_scale, guided.boosting) == (2.0, True)
    corrected = generate(model, ["a dog"], steps=3, sampler="heun", discriminator=guided)
    assert corrected.shape == plain.shape and not torch.equal(corrected, plain)
    silent = sampling.DiscriminatorGuidance.load(model, folder, predictor_weight=0.0)
    assert torch.equal(generate(model, ["a dog"], steps=3, sampler="heun", discriminator=silent), plain)
    record = json.loads((folder / "sublimate.json").read_text())
    assert record["kind"] == "attachment" and record["provenance"]["paper"] == "2211.17091"
    with pytest.raises(ValueError, match="corrects the samplers ddim and heun, not one_step"):
        generate(model, ["a dog"], sampler="one_step", discriminator=guided)


def test_pictures_of_an_attachment_are_refused(tiny_sd_v, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n")
    config = DistillConfig(
        model=str(tiny_sd_v),
        method="discriminator_guidance",
        objective={"discriminator_width": 8},
        data={"prompts": str(prompts), "images": "teacher", "teacher_steps": 1},
        trainer={"output_dir": tmp_path / "run", "validation_steps": 1},
        validation_prompts=("a dog",),
    )
    with pytest.raises(ValueError, match="leave out validation_prompts"):
        distill(config, progress=False)
