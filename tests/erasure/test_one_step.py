"""Erasing from students: the loss is matching x0 at the student's own inputs, and training brings it down."""

import pytest
import torch
from erasing import disturb
from students import few_step_student_of, student_of

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.predictions import add_noise
from sublimate.erasure.methods.one_step import OneStep, OneStepConfig, OneStepObjective
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.export import export_student
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.generate import generate_latents
from sublimate.pipelines.model import open_model
from sublimate.training.objective import Batch
from sublimate.training.randomness import SampleRandom

CAT = Request(Concept("cat", anchor="dog"), preserve=["seven"])


def exported(checkpoint, folder, name="", **how):
    model = open_model(checkpoint)
    student = few_step_student_of(model, name) if name else student_of(model)
    return open_model(export_student(model, student, folder / "student", **how))


@pytest.fixture
def student(tiny_sd_v, tmp_path):
    return exported(tiny_sd_v, tmp_path, t=750)


def start(model, n=4, disturbed=False, **options):
    objective = OneStepObjective(model, OneStepConfig(**options), CAT)
    (turn,) = objective.turns(0)
    if disturbed:
        disturb(objective)
    with torch.no_grad():
        batch = objective.prepare(turn, Batch(Condition(), SampleRandom(0, 0, "student", range(n))), 0)
    return objective, turn, batch


def test_the_loss_matches_x0_at_the_students_own_start(student):
    objective, turn, batch = start(student, retain=0.6)
    assert (batch["t"] == 750).all()
    disturb(objective)
    cat, dog, seven = (student.encode_prompts([p]) for p in ("cat", "dog", "seven"))
    with torch.no_grad():
        loss = objective.loss(turn, batch, 0)
        aimed = student.denoiser(batch["x_t"], 750, dog).x0
        erase = (objective.student(batch["x_t"], 750, cat).x0 - aimed).square().mean()
        x_t = batch["kept_x_t"]
        drift = objective.student(x_t, 750, seven).x0 - student.denoiser(x_t, 750, seven).x0
    torch.testing.assert_close(batch["target"], aimed)
    torch.testing.assert_close(loss.logs["erase"], erase)
    torch.testing.assert_close(loss.total, erase + 0.6 * drift.square().mean())
    assert min(erase, drift.square().mean()) > 1e-6
    # The noise is scaled as in generation: alpha^2 + sigma^2 = 1 at every time.
    assert 0.8 < float(batch["x_t"].std()) < 1.2


def test_the_targets_are_what_the_student_draws_for_the_anchor(student):
    objective, _, batch = start(student)
    z = batch["x_t"] / objective.frozen.schedule.start_scale(750)
    drawn = generate_latents(student, ["dog"] * 4, z=z)
    torch.testing.assert_close(batch["target"], drawn, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_few_step_student_is_trained_at_all_its_times_on_its_own_images(tiny_sd_v, tmp_path):
    few = FewSteps("consistency", steps=3, grid_steps=50)
    model = exported(tiny_sd_v, tmp_path, few_steps=few)
    times = few.call_times(model.schedule)
    objective, _, batch = start(model, n=24, disturbed=True)
    assert objective.times == times and set(batch["t"].tolist()) == set(times)
    random = SampleRandom(0, 0, "student", range(24))
    objective.erased.draw(random)
    z, places, eps = random.normal(objective.shape), random.integers(3), random.normal(objective.shape)
    first = model.schedule.start_scale(times[0]) * z
    with torch.no_grad():
        x0 = objective.student(first, times[0], model.encode_prompts(["cat"])).x0
    later = places > 0
    expected = torch.where(later.view(-1, 1, 1, 1), add_noise(model.schedule, x0, eps, batch["t"]), first)
    torch.testing.assert_close(batch["x_t"], expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_student_that_is_told_its_guidance_is_told_it_here(tiny_sd, tmp_path):
    few = FewSteps("consistency", steps=2, grid_steps=50, guidance_scale=8.0)
    model = exported(tiny_sd, tmp_path, "tiny_sd#told", few_steps=few)
    objective, _, batch = start(model)
    condition = model.encode_prompts(["dog"]).expand(4).replace(guidance=torch.full((4,), 8.0))
    with torch.no_grad():
        torch.testing.assert_close(batch["target"], model.denoiser(batch["x_t"], batch["t"], condition).x0)
    assert objective.scale == 8.0


@pytest.mark.slow
def test_training_makes_the_concepts_images_the_anchors(student):
    request = Request(Concept("cat", anchor="dog"), preserve=["seven"])
    options = {"weights": "x", "learning_rate": 2e-3, "max_train_steps": 60, "train_batch_size": 4}
    edit = OneStep(**options).fit(student, request)

    def drawn(*words):
        return [generate_latents(student, [word] * 8, seed=3) for word in words]

    cat, dog, seven = drawn("cat", "dog", "seven")
    with edit.applied(student):
        new_cat, new_seven = drawn("cat", "seven")
    before = (cat - dog).square().mean()
    assert (new_cat - dog).square().mean() < 0.5 * before
    assert (new_seven - seven).square().mean() < 0.5 * before


@pytest.mark.slow
def test_what_is_no_student_must_be_told_its_times(tiny_sd_v, tmp_path):
    model = open_model(tiny_sd_v)
    with pytest.raises(ValueError, match="set times"):
        OneStep().fit(model, CAT)
    objective, _, batch = start(model, times=(900.0,), guidance_scale=2.0)
    assert (batch["t"] == 900).all() and objective.scale == 2.0


def test_jumps_that_are_told_their_end_are_refused(tiny_sd_v, tmp_path):
    model = open_model(tiny_sd_v)
    model.defaults = {"few_steps": FewSteps("trajectory", steps=2, grid_steps=50).to_dict()}
    with pytest.raises(ValueError, match="told where its jumps end"):
        OneStep().fit(model, CAT)
