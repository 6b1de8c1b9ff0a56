"""Students of several steps: trained where their own sampling leads them."""

from collections import Counter

import pytest
import torch

from sublimate.diffusion.predictions import add_noise
from sublimate.pipelines.few_steps import sample_few_steps
from sublimate.pipelines.model import open_model
from sublimate.training.matching import STUDENT
from sublimate.training.objective import Batch, Turn
from sublimate.training.objectives.disback import DisBackConfig
from sublimate.training.objectives.em_distillation import EMDistillationConfig
from sublimate.training.objectives.f_distill import FDistill, FDistillConfig
from sublimate.training.randomness import SampleRandom

FREE = {"divergence": "reverse_kl", "gan_weight": 0.0, "guidance_scale": 1.0}


def at_place(objective, place):
    """The first step whose student's turn trains a call."""
    return next(step for step in range(99) if objective.config.place(step, STUDENT) == place)


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd3"])
def test_a_call_is_trained_on_what_sampling_makes_of_noise(request, name):
    model = open_model(request.getfixturevalue(name))
    objective = FDistill(model, FDistillConfig(**FREE, sampling_steps=3))
    condition = model.encode_prompts(["red cat", "a dog"])
    step = at_place(objective, 2)
    random = SampleRandom(0, step, STUDENT, range(2))
    with torch.no_grad():
        batch = objective.prepare(Turn(STUDENT, (STUDENT,)), Batch(condition, random.twin()), step)
        x0 = objective.sample(batch)
        drawn = objective.draw(Batch(condition, random))  # the same z, and the noise that follows it
        expected = sample_few_steps(
            objective.exports().few_steps,
            lambda x_t, t, s: model.denoiser(x_t, t, condition),
            drawn["z"],
            model.schedule,
            lambda x: random.normal(tuple(x.shape[1:])),
        )
    assert objective.times == objective.exports().few_steps.call_times(model.schedule)
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4)
    assert batch["reached_t"].tolist() == [objective.times[2]] * 2 and not batch["reached"].requires_grad


def test_the_first_call_is_given_pure_noise_and_later_ones_their_own_results(tiny_sd):
    model = open_model(tiny_sd)
    objective = FDistill(model, FDistillConfig(**FREE, sampling_steps=2))
    condition = model.encode_prompts(["red cat"])
    for place in range(2):
        step = at_place(objective, place)
        random = SampleRandom(0, step, STUDENT, range(1))
        with torch.no_grad():
            batch = objective.prepare(Turn(STUDENT, (STUDENT,)), Batch(condition, random.twin()), step)
            x_t = model.schedule.start_scale(objective.times[0]) * objective.draw(Batch(condition, random))["z"]
            if place:
                x0 = objective.student(x_t, objective.times[0], condition).x0
                x_t = add_noise(model.schedule, x0, random.normal(model.latent_shape), objective.times[1])
        assert torch.equal(batch["reached"], x_t)


def test_every_call_is_trained_as_often_and_the_turns_of_a_step_choose_apart():
    config = FDistillConfig(sampling_steps=4)
    chosen = Counter(config.place(step, STUDENT) for step in range(4000))
    assert all(abs(chosen[place] - 1000) < 100 for place in range(4))
    assert any(config.place(step, STUDENT) != config.place(step, "critic0") for step in range(9))
    assert FDistillConfig(**FREE).passes(0) == FDistillConfig(**FREE).passes(1)
    assert len({FDistillConfig(**FREE, sampling_steps=4).passes(step) for step in range(99)}) > 9


def test_what_has_no_several_steps_is_refused():
    with pytest.raises(ValueError, match="starts at the schedule's end: set start_log_snr to null"):
        FDistillConfig(sampling_steps=2, start_log_snr=-4.0)
    with pytest.raises(ValueError, match="student of one step: set sampling_steps to 1"):
        EMDistillationConfig(sampling_steps=2, start_log_snr=None)
    assert DisBackConfig(sampling_steps=2, start_log_snr=None).sampling_steps == 2
