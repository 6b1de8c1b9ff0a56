"""SpeedUpNet's two stages against their formulas, from training to a picture."""

import json

import pytest
import torch

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.predictions import add_noise
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.pipelines.negative_attention import NEGATIVE, STRENGTH
from sublimate.pipelines.speedupnet import SpeedUpAttention, attach_speedupnet
from sublimate.training.data import ModelSource
from sublimate.training.distill import DistillConfig, distill
from sublimate.training.objective import Turn
from sublimate.training.objectives.speedupnet import SpeedUpNet, SpeedUpNetConfig
from sublimate.training.randomness import SampleRandom

TURN = Turn("adapter", ("adapter",))
FIRST, SECOND = {"stage1_steps": 1}, {"stage1_steps": 0}


def made(folder, stage, samples=4, **options):
    model = open_model(folder)
    options = {"guidance_scale": 3.0, "sampling_steps": 2, "solver_steps": 3, "no_negative": 0.0, **stage, **options}
    objective = SpeedUpNet(model, SpeedUpNetConfig(**options))
    objective.player.set_trainable(True)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    source = ModelSource(model, ["red cat", "a dog"], latents, negatives=["gogh", "seven"])
    with torch.no_grad():
        batch = objective.prepare(TURN, source.batch(SampleRandom(0, 0, "adapter", range(samples))), 0)
    return model, objective, batch


def column(values):
    return values.float()[:, None, None, None]


def stirred(objective):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in objective.player.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))


def guided_by_hand(model, x, t, batch):
    null = model.denoiser(x, t, Condition(text=batch["negative"])).output
    return null + column(batch["scale"]) * (model.denoiser(x, t, batch.condition).output - null)


def stepped_by_hand(schedule, x, v, t, to):
    """A DDIM step of a v-prediction: x0 = alpha x - sigma v, eps = sigma x + alpha v."""
    (a, s), (b, r) = ((column(c.alpha), column(c.sigma)) for c in (schedule.at(t), schedule.at(to)))
    return b * (a * x - s * v) + r * (s * x + a * v)


@torch.no_grad()
def stage1_by_hand(model, objective, batch):
    x, t = add_noise(model.schedule, batch["images"], batch["eps"], batch["t"]), batch["t"]
    student = objective.student(x, t, objective.told(batch)).output
    return (student - guided_by_hand(model, x, t, batch)).square().mean().item()


@torch.no_grad()
def long_step_by_hand(model, objective, batch):
    schedule, grid = model.schedule, model.schedule.grid(6)
    x_t = add_noise(schedule, batch["images"], batch["eps_long"], grid[batch["place"]])
    x = x_t
    for small in range(3):
        t, to = grid[batch["place"] + small], grid[batch["place"] + small + 1]
        x = stepped_by_hand(schedule, x, guided_by_hand(model, x, t, batch), t, to)
    t, to = grid[batch["place"]], grid[batch["place"] + 3]
    student = objective.student(x_t, t, objective.told(batch)).output
    return (stepped_by_hand(schedule, x_t, student, t, to) - x).square().mean().item()


RANGES = [None, (1.0, 6.0)]


@pytest.mark.slow
@pytest.mark.parametrize("guidance_range", RANGES)
def test_stage_1_is_its_formula(tiny_sd_v, guidance_range):
    model, objective, batch = made(tiny_sd_v, FIRST, guidance_range=guidance_range)
    stirred(objective)
    expected = stage1_by_hand(model, objective, batch)
    assert objective.loss(TURN, batch, 0).total.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("guidance_range", RANGES)
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_stage_2_is_its_formula(tiny_sd_v, weight, guidance_range):
    model, objective, batch = made(tiny_sd_v, SECOND, original_weight=weight, guidance_range=guidance_range)
    stirred(objective)
    expected = long_step_by_hand(model, objective, batch)
    if weight:
        expected += weight * stage1_by_hand(model, objective, batch)
    assert objective.loss(TURN, batch, 0).total.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_long_steps_are_those_of_the_sampler_and_stage_1_has_times_of_its_own(tiny_sd_v):
    model, objective, batch = made(tiny_sd_v, SECOND, samples=64)
    grid = objective.solver.grid
    assert torch.equal(grid[::3], model.schedule.grid(2))
    assert set(batch["place"].tolist()) == {0, 3}
    assert len(set(batch["t"].tolist())) > 40
    _, _, first = made(tiny_sd_v, FIRST)
    assert "place" not in first.tensors


@pytest.mark.slow
def test_without_guidance_there_is_nothing_to_learn(tiny_sd_v):
    """At w = 1 the target is the network's own, whatever the adapter has become."""
    _, objective, batch = made(tiny_sd_v, FIRST)
    stirred(objective)
    assert objective.loss(TURN, batch, 0).total.item() > 1e-4
    assert objective.loss(TURN, batch.adding(scale=torch.ones(4)), 0).total.item() < 1e-12


@pytest.mark.slow
def test_the_adapter_is_told_the_guidance_of_each_sample_and_the_teacher_no_negative(tiny_sd_v):
    _, objective, batch = made(tiny_sd_v, FIRST, samples=64, guidance_range=(1.0, 6.0))
    w = batch["scale"]
    assert 1 <= w.min() < 2 and 5 < w.max() < 6
    told = objective.told(batch)
    torch.testing.assert_close(told[STRENGTH], (1 - 1 / w).float())
    assert torch.equal(told[NEGATIVE], batch["negative"])
    assert set(batch.condition) == {"text"}
    _, objective, batch = made(tiny_sd_v, FIRST)
    assert objective.told(batch)[STRENGTH].tolist() == pytest.approx([2 / 3] * 4)


@pytest.mark.slow
def test_only_the_adapter_learns_and_it_learns(tiny_sd_v):
    model, objective, batch = made(tiny_sd_v, FIRST)
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
    assert all(p.grad is not None for p in objective.player.trainable().values())
    assert all(".processor." in name for name in objective.player.names)
    own = dict(objective.student.named_parameters())
    assert all(own[name] is p for name, p in model.denoiser.named_parameters())
    assert not any(isinstance(m, SpeedUpAttention) for m in model.denoiser.modules())


@pytest.mark.slow
def test_some_samples_have_no_negative_prompt(tiny_sd_v):
    model, _, batch = made(tiny_sd_v, FIRST, no_negative=1.0)
    null = model.null_condition()["text"]
    assert torch.equal(batch["negative"], null.expand(4, -1, -1))
    _, _, batch = made(tiny_sd_v, FIRST)
    assert not any(torch.equal(states, null[0]) for states in batch["negative"])
    _, _, batch = made(tiny_sd_v, FIRST, samples=64, no_negative=0.5)
    assert 16 < sum(torch.equal(states, null[0]) for states in batch["negative"]) < 48


def test_the_cost_follows_the_stage():
    config = SpeedUpNetConfig(stage1_steps=2, solver_steps=4)
    assert [config.passes(step) for step in (0, 1, 2)] == [5, 5, 16]
    assert SpeedUpNetConfig(stage1_steps=2, solver_steps=4, original_weight=0).passes(2) == 11


def test_options_that_contradict_each_other_are_named():
    with pytest.raises(ValueError, match="guidance_range starts at 1"):
        SpeedUpNetConfig(guidance_range=(0.5, 8.0))
    with pytest.raises(ValueError, match=r"has guidance_scale 7\.5 in it"):
        SpeedUpNetConfig(guidance_range=(1.0, 5.0))
    with pytest.raises(ValueError, match=r"set adapter\.kind to full"):
        SpeedUpNetConfig(adapter={"kind": "lora"})


@pytest.mark.slow
def test_it_trains_exports_and_draws(tiny_sd_v, tmp_path):
    (tmp_path / "p.txt").write_text("red cat\na dog\n")
    (tmp_path / "n.txt").write_text("gogh\n")
    data = {"prompts": str(tmp_path / "p.txt"), "negatives": str(tmp_path / "n.txt"), "images": "teacher"}
    config = DistillConfig(
        model=str(tiny_sd_v),
        method="speedupnet",
        objective={"stage1_steps": 1, "solver_steps": 2, "positive": True, "adapter": {"learning_rate": 0.05}},
        data={**data, "teacher_steps": 1},
        trainer={"output_dir": tmp_path / "run", "max_train_steps": 2, "train_batch_size": 2},
    )
    folder = distill(config, progress=False)
    record = json.loads((folder / "sublimate.json").read_text())
    assert record["options"] == {"positive": True, "guidance_scale": 7.5, "steps": 4}
    assert record["provenance"]["method"] == "speedupnet"
    assert "attach_speedupnet(model" in (folder / "README.md").read_text()
    model = open_model(tiny_sd_v)
    plain = generate(model, ["a dog"], steps=4, guidance_scale=1.0)
    attach_speedupnet(model, folder)
    assert not torch.equal(generate(model, ["a dog"], negative_prompt="gogh"), plain)


def test_a_teacher_that_reads_more_than_tokens_is_refused(tiny_sdxl):
    with pytest.raises(ValueError, match=r"cannot be told a negative prompt's text\.pooled"):
        SpeedUpNet(open_model(tiny_sdxl), SpeedUpNet.Config())
