"""Flash Diffusion: its mixture of times and phases, its target, and its terms written out."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from oracles import SCHEDULE, STUDENT, tiny_model
from torch import nn

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from sublimate.diffusion.predictions import add_noise
from sublimate.diffusion.schedules import DiscreteVP, TrigFlow
from sublimate.pipelines.model import open_model
from sublimate.training.objective import Batch, Turn
from sublimate.training.objectives.flash import Flash, FlashConfig
from sublimate.training.players import Player, PlayerConfig
from sublimate.training.randomness import SampleRandom

DISCRIMINATOR = Turn("discriminator", ("discriminator",))
FULL = {"guidance_range": (1.0, 1.0), "student": PlayerConfig(), "discriminator_width": 8}
MEAN, STD = 0.4, 0.6


def make(extractor=None, schedule=SCHEDULE, **options):
    objective = Flash(tiny_model(schedule), FlashConfig(**{**FULL, **options}), extractor)
    objective.players()["student"].set_trainable(True)
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.mul_(1.1)
    return objective


def batch_of(size=16, step=0, name="student"):
    random = SampleRandom(1, step, name, range(size))
    return Batch(Condition(), random, {"images": MEAN + STD * random.normal((1,))})


def prepared(objective, step=0, turn=STUDENT):
    with torch.no_grad():
        return objective.prepare(turn, batch_of(step=step, name=turn.name), step)


def test_the_mixture_is_the_papers_in_every_phase():
    config = FlashConfig()
    for step, weights in ((0, (0, 0, 0.5, 0.5)), (5000, (0.1, 0.3, 0.3, 0.3)), (10**6, (0.4, 0.2, 0.2, 0.2))):
        density = [
            sum(w * math.exp(-((i - 8 * j) ** 2) / (2 * 0.5)) for j, w in enumerate(weights)) for i in range(32)
        ]
        expected = torch.tensor(density, dtype=torch.float64) / sum(density)
        torch.testing.assert_close(config.start_probabilities(step), expected)
    assert float(FlashConfig(start="uniform").start_probabilities(0).max()) == pytest.approx(1 / 32)
    middle = FlashConfig(start="gaussian").start_probabilities(0)
    assert int(middle.argmax()) == 16 and float(middle.sum()) == pytest.approx(1)


def test_places_are_drawn_from_the_mixture_and_repeat():
    config = FlashConfig(mode_weights=((0.5, 0.0, 0.0, 0.5),))
    drawn = [config.place(step) for step in range(400)]
    assert drawn == [config.place(step) for step in range(400)]
    counts = torch.bincount(torch.tensor(drawn), minlength=32) / 400
    assert (counts - config.start_probabilities(0)).abs().max() < 0.07
    other = config.model_copy(update={"seed": 1})
    assert [other.place(step) for step in range(20)] != drawn[:20]


def test_weights_follow_the_phases():
    config = FlashConfig(phase_steps=10)
    assert [config.weight(config.dmd_weights, step) for step in (0, 9, 10, 25, 99)] == [0, 0, 0.3, 0.5, 0.7]
    objective = make(phase_steps=10)
    assert [turn.name for turn in objective.turns(0)] == ["student"]
    assert [turn.name for turn in objective.turns(10)] == ["discriminator", "student"]
    assert make(adversarial_weights=(0.0,)).players().keys() == {"student"}


def test_the_cost_of_a_step_depends_on_where_it_starts():
    config = FlashConfig(mode_weights=((0.5, 0.0, 0.0, 0.5),), phase_steps=100)
    for step in (0, 1, 2, 3, 150):
        more = 3 + 5 if step >= 100 else 0
        assert config.passes(step) == 2 * (32 - config.place(step)) + 3 + more


def test_the_target_is_the_teachers_own_sample():
    objective = make(teacher_steps=8, mode_weights=((0, 1.0),))
    place = objective.config.place(0)
    assert 0 < place < 8
    batch = prepared(objective)
    t = objective.grid[place]
    assert torch.equal(batch["x_t"], add_noise(objective.schedule, batch["images"], batch["eps"], t))
    x = batch["x_t"]
    for now, then in zip(objective.grid[place:-1].tolist(), objective.grid[place + 1 :].tolist(), strict=True):
        c = objective.schedule.at(then)
        with torch.no_grad():
            x = objective.teacher(x, now).combine(c.alpha, c.sigma)
    torch.testing.assert_close(batch["target"], x)


def test_the_noisiest_time_is_pure_noise():
    # A table whose last entry still has signal.
    schedule = DiscreteVP(torch.linspace(0.9, 0.1, 10))
    options = {"teacher_steps": 4, "mode_weights": ((1.0, 0.0, 0.0, 0.0),), "mode_variance": 0.01}
    objective = make(schedule=schedule, **options)
    batch = prepared(objective)
    assert objective.config.place(0) == 0
    assert torch.equal(batch["x_t"], objective.schedule.noise_scale * batch["eps"])


@pytest.mark.slow
def test_the_exact_flow_has_no_distance_up_to_the_teachers_steps():
    """Gaussian data: f(x, t) = m + (x - alpha m) s / sqrt(alpha^2 s^2 + sigma^2)."""
    schedule = TrigFlow(1.0)

    class Exact(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x_t, t, condition=None, *, features=()):
            c = schedule.at(t)
            spread = (c.alpha**2 * STD**2 + c.sigma**2).sqrt()
            return SimpleNamespace(x0=MEAN + (x_t - (c.alpha * MEAN)[:, None]) * (STD / spread)[:, None])

    def loss(steps):
        objective = make(teacher_steps=steps, start="uniform", dmd_weights=(0.0,), adversarial_weights=(0.0,))
        data = GaussianMixture(torch.ones(1), torch.tensor([[MEAN]]), torch.tensor([STD])).double()
        objective.teacher = MixtureDenoiser(data, schedule)
        objective._players["student"] = Player(Exact(), PlayerConfig(), frozenset({"unused"}))
        return max(float(objective.loss(STUDENT, prepared(objective, step), step).total) for step in range(6))

    assert loss(400) < 1e-4 < loss(4)


def test_every_term_is_its_formula():
    objective = make(
        dmd_weights=(0.5,), adversarial_weights=(0.3,), distance="l1", distill_weight=2.0, teacher_steps=4
    )
    batch = prepared(objective)
    loss = objective.loss(STUDENT, batch, 0)
    schedule, judge = objective.schedule, objective.players()["discriminator"].module
    with torch.no_grad():
        x0 = objective.student(batch["x_t"], batch["t"]).x0
        distill = (x0 - batch["target"]).abs().mean()
        x_t = add_noise(schedule, x0, batch["eps_real"], batch["matched"])
        real, fake = objective.teacher(x_t, batch["matched"]).x0, objective.student(x_t, batch["matched"]).x0
        direction = (fake - real) / (x0 - real).abs().mean(1, keepdim=True)
        dmd = direction.square().mean()
        x_t = add_noise(schedule, x0, batch["eps_fake"], batch["judged"])
        logits = judge(objective.teacher(x_t, batch["judged"], features=objective.taps), None)
        adversarial = (1 - logits.sigmoid()).square().mean()
    assert loss.total.item() == pytest.approx(float(2 * distill + 0.5 * dmd + 0.3 * adversarial), rel=1e-5)
    levels = schedule.uniform_time(torch.tensor(objective.config.discriminator_levels, dtype=torch.float64))
    assert bool((batch["judged"][:, None] - levels).abs().amin(1).max() < 1e-12)


def test_the_matching_term_moves_x0_against_the_direction():
    objective = make(dmd_weights=(1.0,), adversarial_weights=(0.0,), teacher_steps=2)
    batch = prepared(objective)
    x0 = objective.student(batch["x_t"], batch["t"]).x0.detach().requires_grad_(True)
    (found,) = torch.autograd.grad(objective._matching(x0, batch).sum(), x0)
    with torch.no_grad():
        x_t = add_noise(objective.schedule, x0, batch["eps_real"], batch["matched"])
        real, fake = (net(x_t, batch["matched"]).x0 for net in (objective.teacher, objective.student))
        expected = 2 * (fake - real) / (x0 - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_discriminator_learns_images_against_samples():
    objective = make(adversarial_weights=(0.3,))
    batch = prepared(objective, turn=DISCRIMINATOR)
    judge = objective.players()["discriminator"].module
    with torch.no_grad():
        logits = {}
        for name, eps in (("images", "eps_real"), ("x0", "eps_fake")):
            x_t = add_noise(objective.schedule, batch[name], batch[eps], batch["judged"])
            logits[name] = judge(objective.teacher(x_t, batch["judged"], features=objective.taps), None).sigmoid()
        expected = ((1 - logits["images"]).square().mean() + logits["x0"].square().mean()) / 2
    assert objective.loss(DISCRIMINATOR, batch, 0).total.item() == pytest.approx(float(expected), rel=1e-5)


def test_a_perceptual_distance_reads_decoded_images():
    objective = make(lambda images: [images, images.square()], distance="perceptual", dmd_weights=(0.0,))
    objective.model = SimpleNamespace(render=lambda latents: 2 * latents)
    batch = prepared(objective)
    with torch.no_grad():
        x0, target = 2 * objective.student(batch["x_t"], batch["t"]).x0, 2 * batch["target"]
        expected = (x0 - target).square().mean() + (x0**2 - target**2).square().mean()
    assert objective.loss(STUDENT, batch, 0).total.item() == pytest.approx(float(expected), rel=1e-5)
    for refused in ({"distance": "perceptual"}, {"extractor": lambda images: [images]}):
        with pytest.raises(ValueError, match="Only the perceptual distance has an extractor"):
            make(**refused)


def test_an_extractor_sees_the_centre():
    seen = []
    objective = make(lambda images: seen.append(images) or [images], distance="perceptual", crop=4)
    objective.model = SimpleNamespace(render=lambda latents: latents)
    latents = torch.arange(2 * 1 * 7 * 3.0).view(2, 1, 7, 3)
    objective._features(latents, batch_of())
    assert torch.equal(seen[0], latents[:, :, 1:5])


@pytest.mark.slow
def test_the_target_is_guided_by_each_samples_own_scale(tiny_sd):
    model = open_model(tiny_sd)
    config = FlashConfig(
        guidance_range=(3.0, 13.0), teacher_steps=2, mode_weights=((1.0,),), adversarial_weights=(0.0,)
    )
    objective = Flash(model, config)
    random = SampleRandom(1, 0, "student", range(6))
    images = random.normal(model.latent_shape)
    condition = model.encode_prompts(["red cat", "a dog"] * 3)
    with torch.no_grad():
        batch = objective.prepare(STUDENT, Batch(condition, random, {"images": images}), 0)
        scale, x = batch["scale"], batch["x_t"]
        assert len(scale.unique()) == 6 and 3 <= float(scale.min()) < 6 and 10 < float(scale.max()) <= 13
        null = model.null_condition().expand(6)
        for t, s in itertools.pairwise(objective.grid[config.place(0) :].tolist()):
            own, other = (model.denoiser(x, t, c) for c in (condition, null))
            c, w = objective.schedule.at(s), scale.view(-1, 1, 1, 1)
            x0, eps = (b + w * (a - b) for a, b in ((own.x0, other.x0), (own.eps, other.eps)))
            x = (c.alpha * x0 + c.sigma * eps).float()
    torch.testing.assert_close(batch["target"], x, rtol=1e-4, atol=1e-4)


def test_guidance_is_none_for_a_range_of_ones_and_refused_where_there_is_no_text():
    with pytest.raises(ValueError, match="no null condition"):
        make(guidance_range=(3.0, 13.0))
    assert "scale" not in prepared(make()).tensors
    with pytest.raises(ValueError, match="not all 0"):
        FlashConfig(mode_weights=((0.0, 0.0),))
