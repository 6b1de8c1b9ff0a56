"""SNOOPI's training: its special case, whose guidance is random, and what negative prompts reach."""

import pytest
import torch
from oracles import STUDENT, tiny_model

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.guidance import guided
from sublimate.pipelines.model import open_model
from sublimate.pipelines.negative_attention import NEGATIVE, takes_negatives
from sublimate.training.data import ModelSource
from sublimate.training.objective import Batch, Turn
from sublimate.training.objectives.f_distill import FDistill, FDistillConfig
from sublimate.training.objectives.swiftbrush import SwiftBrush, SwiftBrushConfig
from sublimate.training.randomness import SampleRandom

LORA = {"kind": "lora", "rank": 2}
PROMPTS, NEGATIVES = ["red cat", "a dog"], ["gogh", "a painting", "seven"]


def make(folder, cls=SwiftBrush, config=SwiftBrushConfig, **options):
    model = open_model(folder)
    torch.manual_seed(0)
    objective = cls(model, config(critic=LORA, **options))
    torch.manual_seed(1)
    with torch.no_grad():  # off the teacher
        for parameter in objective.players()["student"].trainable().values():
            parameter.mul_(1.05)
    for name, player in objective.players().items():
        player.set_trainable(name == "student")
    return model, objective


def prepared(model, objective, turn=STUDENT, negatives=()):
    batch = ModelSource(model, PROMPTS, negatives=negatives).batch(SampleRandom(2, 0, turn.name, range(6)))
    with torch.no_grad():
        return objective.prepare(turn, batch, 0)


def gradient(objective, batch):
    return torch.autograd.grad(
        objective.loss(STUDENT, batch, 0).total, list(objective.players()["student"].trainable().values())
    )


def test_a_range_of_ones_is_no_guidance_and_costs_none():
    assert SwiftBrushConfig(guidance_range=(1.0, 1.0)).teacher_passes == 1
    torch.manual_seed(0)
    objective = SwiftBrush(tiny_model(), SwiftBrushConfig(guidance_range=(1.0, 1.0), critic={"kind": "full"}))
    batch = Batch(Condition(), SampleRandom(2, 0, "student", range(6)))
    with torch.no_grad():
        batch = objective.prepare(STUDENT, batch, 0)
    assert "scale" not in batch.tensors and bool(objective.loss(STUDENT, batch, 0).total.isfinite())


@pytest.mark.slow
def test_with_one_scale_it_is_reverse_kl_of_f_distill(tiny_sd_v):
    model, swift = make(tiny_sd_v, guidance_range=None, guidance_scale=2.0)
    options = {"divergence": "reverse_kl", "gan_weight": 0.0, "guidance_scale": 2.0}
    _, plain = make(tiny_sd_v, FDistill, FDistillConfig, **options)
    draws = prepared(model, plain)
    batch = prepared(model, swift).adding(**{name: draws[name] for name in ("z", "eps", "t")})
    found, expected = gradient(swift, batch), gradient(plain, draws)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
def test_the_teachers_scale_is_random_per_sample(tiny_sd_v):
    model, objective = make(tiny_sd_v, guidance_range=(0.5, 4.0), sample_normalization=False)
    batch = prepared(model, objective)
    scale = batch["scale"]
    assert len(set(scale.tolist())) == 6 and bool(((scale >= 0.5) & (scale < 4)).all())
    with torch.no_grad():
        x0 = objective.sample(batch)
        x_t = objective.noised(x0, batch)
        p = guided(model.denoiser, x_t, batch["t"], batch.condition, model.null_condition(), scale).x0
        q = objective.critic(x_t, batch["t"], batch.condition).x0
    expected = torch.autograd.grad(
        ((q - p) * objective.sample(batch)).mean(), list(objective.players()["student"].trainable().values())
    )
    for a, b in zip(gradient(objective, batch), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()) + 1e-10)


@pytest.mark.slow
def test_without_normalization_the_mean_scale_decides(tiny_sd_v):
    """The pull is affine in the scale, so that a range pulls as its middle does, on average."""
    model, objective = make(tiny_sd_v, guidance_range=(0.5, 4.0), sample_normalization=False)
    batch = prepared(model, objective)
    low, middle, high = (
        gradient(objective, batch.adding(scale=torch.full_like(batch["scale"], k))) for k in (0.5, 2.25, 4.0)
    )
    for a, b, c in zip(low, middle, high, strict=True):
        torch.testing.assert_close((a + c) / 2, b, rtol=1e-3, atol=1e-5 * float(c.abs().max()) + 1e-9)


@pytest.mark.slow
def test_guiding_the_critic_too_makes_the_teacher_a_fixed_point(tiny_sd_v):
    """The critic starts as the teacher: then the published variant pulls nowhere, whatever the scale."""
    largest = {}
    for both in (True, False):
        model, objective = make(tiny_sd_v, guide_critic=both, sample_normalization=False)
        largest[both] = max(float(g.abs().max()) for g in gradient(objective, prepared(model, objective)))
    assert largest[True] < 1e-4 * largest[False]


@pytest.mark.slow
def test_negative_prompts_reach_the_student_and_the_teachers_null_only(tiny_sd_v):
    model, objective = make(tiny_sd_v, negative_attention=True, sample_normalization=False)
    assert objective.needs == {"prompts", "negatives"}
    assert takes_negatives(objective.student.network)
    assert not takes_negatives(model.denoiser.network) and not takes_negatives(objective.critic.network)
    batch = prepared(model, objective, negatives=NEGATIVES)
    assert NEGATIVE not in batch.condition
    strength = batch["strength"]
    assert len(set(strength.tolist())) == 6 and bool(((strength >= 0) & (strength < 1)).all())
    with torch.no_grad():
        x0 = objective.sample(batch)
        plain = objective.generate(batch["z"], batch.condition)
        assert not torch.equal(x0, plain)
        x_t = objective.noised(x0, batch)
        # (1 - k) mu(y-) + k mu(y)
        k = batch["scale"].float()[:, None, None, None]
        away = model.denoiser(x_t, batch["t"], batch.condition.replace(text=batch["negative"])).x0
        p = (1 - k) * away + k * model.denoiser(x_t, batch["t"], batch.condition).x0
        q = objective.critic(x_t, batch["t"], batch.condition).x0
    expected = torch.autograd.grad(
        ((q - p) * objective.sample(batch)).mean(), list(objective.players()["student"].trainable().values())
    )
    for a, b in zip(gradient(objective, batch), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-10)
    critic = prepared(model, objective, Turn("critic0", ("critic",)), NEGATIVES)
    assert torch.equal(critic["x0"], objective.sample(critic).detach())


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="guidance_scale is not used where guidance_range is given"):
        SwiftBrushConfig(guidance_scale=2.0)
    for bounds in ((4.0, 0.5), (-1.0, 2.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="0 <= low <= high"):
            SwiftBrushConfig(guidance_range=bounds)
    with pytest.raises(ValueError, match="the teacher reads no negative prompts"):
        SwiftBrushConfig(guidance_range=None, negative_attention=True)
    with pytest.raises(ValueError, match="no null condition"):
        SwiftBrush(tiny_model(), SwiftBrushConfig(critic={"kind": "lora", "rank": 1, "target_modules": ("0",)}))


@pytest.mark.slow
def test_negatives_that_nothing_reads_are_refused(tiny_sd_v):
    model, objective = make(tiny_sd_v)
    with pytest.raises(ValueError, match=r"set it, or data\.negatives to null"):
        prepared(model, objective, negatives=NEGATIVES)


@pytest.mark.slow
def test_it_needs_no_images(tiny_sd_v):
    assert make(tiny_sd_v)[1].needs == {"prompts"}
