"""SpeedUpNet's two stages against their formulas, from training to a picture."""

import json

import pytest
import torch

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.predictions import add_noise
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.pipelines.speedupnet import attach_speedupnet
from sublimate.training.data import ModelSource
from sublimate.training.distill import DistillConfig, distill
from sublimate.training.objective import Turn
from sublimate.training.objectives.speedupnet import SpeedUpNet, SpeedUpNetConfig
from sublimate.training.randomness import SampleRandom

TURN = Turn("adapter", ("adapter",))
STAGES = {"guidance": 10, "consistency": 0}


def made(folder, stage, **options):
    model = open_model(folder)
    options = {"guidance_steps": STAGES[stage], "sampling_steps": 2, "solver_steps": 3, "no_negative": 0.0, **options}
    objective = SpeedUpNet(model, SpeedUpNetConfig(guidance_scale=3.0, **options))
    objective.player.set_trainable(True)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    source = ModelSource(model, ["red cat", "a dog"], latents, negatives=["gogh", "seven"])
    with torch.no_grad():
        batch = objective.prepare(TURN, source.batch(SampleRandom(0, 0, "adapter", range(4))), 0)
    return model, objective, batch


def guided_by_hand(model, x, t, batch):
    null = model.denoiser(x, t, Condition(text=batch["negative"])).output
    return null + 3.0 * (model.denoiser(x, t, batch.condition).output - null)


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_is_its_formula(tiny_sd_v, stage):
    model, objective, batch = made(tiny_sd_v, stage)
    schedule, t = model.schedule, batch["t"]
    with torch.no_grad():
        x = add_noise(schedule, batch["images"], batch["eps"], t)
        student = model.denoiser(x, t, batch.condition)  # the adapter starts as its base
        target = guided_by_hand(model, x, t, batch)
        expected = (student.output - target).square().mean()
        if stage == "consistency":
            grid = schedule.grid(6)
            assert set(t.tolist()) <= {grid[0].item(), grid[3].item()}
            at = t
            for small in (1, 2, 3):
                to = torch.stack([grid[(grid == start).nonzero()[0, 0] + small] for start in t])
                c, c_to = schedule.at(at), schedule.at(to)
                y = guided_by_hand(model, x, at, batch)
                a, s, b, r = (v.float()[:, None, None, None] for v in (c.alpha, c.sigma, c_to.alpha, c_to.sigma))
                # v-prediction: x0 = alpha x - sigma v, eps = sigma x + alpha v
                x, at = b * (a * x - s * y) + r * (s * x + a * y), to
            c = schedule.at(at)
            expected = expected + (student.combine(c.alpha, c.sigma) - x).square().mean()
    assert objective.loss(TURN, batch, 0).total.item() == pytest.approx(expected.item(), rel=1e-4)


def test_only_the_adapter_learns_and_it_learns(tiny_sd_v):
    model, objective, batch = made(tiny_sd_v, "guidance")
    before = model.content_hash()
    optimizer = torch.optim.Adam(objective.player.trainable().values(), lr=0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = objective.loss(TURN, batch, 0).total
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert model.content_hash() == before
    assert all(p.grad is None for p in model.denoiser.parameters())
    assert all(".processor." in name for name in objective.player.names)
    own = dict(objective.student.named_parameters())
    shared = model.denoiser.network.conv_in.weight
    assert own["network.conv_in.weight"] is shared


def test_some_samples_have_no_negative_prompt(tiny_sd_v):
    model, _, batch = made(tiny_sd_v, "guidance", no_negative=1.0)
    assert torch.equal(batch["negative"], model.null_condition()["text"].expand(4, -1, -1))
    _, _, batch = made(tiny_sd_v, "guidance")
    assert not torch.equal(batch["negative"][0], model.null_condition()["text"][0])


def test_the_cost_follows_the_stage():
    config = SpeedUpNetConfig(guidance_steps=2, solver_steps=4)
    assert [config.passes(step) for step in (0, 1, 2)] == [5, 5, 11]


def test_it_trains_exports_and_draws(tiny_sd_v, tmp_path):
    (tmp_path / "p.txt").write_text("red cat\na dog\n")
    (tmp_path / "n.txt").write_text("gogh\n")
    data = {"prompts": str(tmp_path / "p.txt"), "negatives": str(tmp_path / "n.txt"), "images": "teacher"}
    config = DistillConfig(
        model=str(tiny_sd_v),
        method="speedupnet",
        objective={"guidance_steps": 1, "solver_steps": 2, "adapter": {"learning_rate": 0.05}},
        data={**data, "teacher_steps": 1},
        trainer={"output_dir": tmp_path / "run", "max_train_steps": 2, "train_batch_size": 2},
    )
    folder = distill(config, progress=False)
    assert json.loads((folder / "sublimate.json").read_text())["options"]["sampling_steps"] == 4
    model = open_model(tiny_sd_v)
    plain = generate(model, ["a dog"], steps=4, guidance_scale=1.0)
    attach_speedupnet(model, folder)
    assert not torch.equal(generate(model, ["a dog"], steps=4, guidance_scale=1.0, negative_prompt="gogh"), plain)
