"""Few-step sampling: its times and targets against stock schedulers, and what generation makes of a recorded one."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, TCDScheduler

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from sublimate.diffusion.schedules import EDM, DiscreteVP, RectifiedFlow
from sublimate.pipelines.few_steps import FewSteps, sample_few_steps
from sublimate.pipelines.generate import generate, generate_latents
from sublimate.pipelines.model import open_model
from sublimate.pipelines.sampling import image_generator, telling
from sublimate.pipelines.stock_few_steps import flow_sampling

VP = DiscreteVP(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("stock", "grid"), [(LCMScheduler, 50), (TCDScheduler, 50), (TCDScheduler, 250)])
def test_times_are_those_of_the_stock_schedulers(stock, grid, steps):
    scheduler = stock(original_inference_steps=grid)
    scheduler.set_timesteps(steps)
    few = FewSteps("consistency", steps=steps, grid_steps=grid)
    assert few.call_times(VP) == tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.2, 0.3, 0.7])
def test_targets_of_a_table_round_like_tcd(eta):
    # (1 - .3) * 700 falls on either side of 490 depending on the precision.
    for times in ((999, 700, 490, 10), (999, 759, 499, 259)):
        few = FewSteps("target_driven", eta=eta, times=times)
        expected = [int(torch.floor((1 - eta) * torch.tensor(t))) for t in times[1:]]
        assert few.targets(VP) == (*map(float, expected), -1.0)


def test_full_eta_is_consistency_sampling():
    for sampler in ("consistency", "target_driven", "trajectory"):
        for schedule in (VP, EDM(), RectifiedFlow()):
            assert set(FewSteps(sampler, eta=1.0).targets(schedule)) == {schedule.t_clean}


@pytest.mark.parametrize("schedule", [VP, EDM(), RectifiedFlow()], ids=["vp", "edm", "flow"])
def test_gamma_is_a_fraction_of_the_noise_level(schedule):
    few = FewSteps("trajectory", steps=3, eta=0.6)
    targets = few.targets(schedule)
    for to, s in zip(few.call_times(schedule)[1:], targets, strict=False):
        c, c_s = schedule.at(to), schedule.at(s)
        assert math.isclose(float(c_s.sigma / c_s.alpha), 0.8 * float(c.sigma / c.alpha), rel_tol=1e-9)
    assert targets[-1] == schedule.t_clean
    assert replace(few, eta=0.0).targets(schedule)[:-1] == few.call_times(schedule)[1:]


def test_a_deterministic_sampling_is_ddim_and_draws_no_noise(tiny_sd):
    model = open_model(tiny_sd)
    drawn = generate(model, ["a cat"], steps=4, sampler="target_driven", eta=0, guidance_scale=2)
    expected = generate(model, ["a cat"], steps=4, sampler="ddim", guidance_scale=2)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"sampler": "consistency"}, {"sampler": "target_driven", "eta": 0.4}])
def test_noise_continues_each_images_own_generator(tiny_sd, options):
    model = open_model(tiny_sd)
    prompts = ["a cat", "a dog", "red", "van gogh", "seven"]
    whole = generate_latents(model, prompts, steps=3, guidance_scale=1.5, **options)
    parts = generate_latents(model, prompts, steps=3, guidance_scale=1.5, batch_size=2, **options)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)

    generator, few = image_generator(0, 1), FewSteps(steps=3, **options)
    told = telling(model.denoiser, model.encode_prompts(["a dog"]), model.null_condition(), 1.5)
    shape = (1, *model.latent_shape)
    with torch.no_grad():
        z = torch.randn(shape, generator=generator)
        alone = sample_few_steps(few, told, z, model.schedule, lambda _: torch.randn(shape, generator=generator))
    torch.testing.assert_close(whole[1:2], alone, atol=1e-5, rtol=1e-5)


def few_step_folder(base, folder, few: FewSteps) -> Path:
    copy = Path(shutil.copytree(base, folder))
    times = few.call_times(open_model(base).schedule)
    record = {"few_steps": few.to_dict(), "steps": few.steps, "start": times[0], "guidance_scale": few.guidance_scale}
    (copy / "sublimate.json").write_text(json.dumps(record))
    return copy


@pytest.mark.slow
def test_a_recorded_sampling_is_the_default(tiny_sd, tmp_path):
    few = FewSteps("target_driven", eta=0.3, grid_steps=250, guidance_scale=1.7)
    student, base = open_model(few_step_folder(tiny_sd, tmp_path / "student", few)), open_model(tiny_sd)
    shared = {"sampler": "target_driven", "guidance_scale": 1.7}
    own = generate(student, ["a cat"])
    # The base does not know the student's grid; 250 of its times are 4 steps apart.
    assert not torch.equal(own, generate(base, ["a cat"], steps=4, eta=0.3, **shared))
    student.defaults["few_steps"]["times"] = [999, 751, 499, 251]
    assert torch.equal(own, generate(student, ["a cat"]))
    assert torch.equal(own, generate(student, ["a cat"], steps=4, eta=0.3, **shared))
    for changed in ({"eta": 0.0}, {"steps": 2}, {"guidance_scale": 3.0}, {"sampler": "consistency"}):
        assert not torch.equal(own, generate(student, ["a cat"], **changed)), changed


@pytest.mark.slow
def test_a_few_step_student_also_draws_in_one(tiny_sd, tmp_path):
    few = FewSteps("target_driven", eta=0.3, grid_steps=250, guidance_scale=1.7)
    student, base = open_model(few_step_folder(tiny_sd, tmp_path / "student", few)), open_model(tiny_sd)
    one = generate(student, ["a cat"], steps=1)
    expected = generate(base, ["a cat"], steps=1, sampler="one_step", guidance_scale=1.7)
    torch.testing.assert_close(one, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(generate(student, ["a cat"], sampler="one_step"), expected, atol=1e-6, rtol=0)
    early = generate(student, ["a cat"], steps=1, start=400)
    expected = generate(base, ["a cat"], steps=1, start=400, guidance_scale=1.7)
    torch.testing.assert_close(early, expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="takes 1 step, not 4"):
        generate(student, ["a cat"], start=400)


@pytest.mark.slow
def test_clipping_is_for_the_first_calls(tiny_sd):
    model = open_model(tiny_sd)
    options = {"steps": 3, "sampler": "target_driven", "guidance_scale": 7}
    images = [generate_latents(model, ["a cat"], clipped_calls=n, **options) for n in range(4)]
    assert torch.equal(images[0], generate_latents(model, ["a cat"], **options))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(images))
    assert float(images[3].abs().max()) <= 1 < float(images[2].abs().max())


def test_a_clipped_call_keeps_the_networks_eps():
    far = GaussianMixture(torch.ones(1), torch.full((1, 1), 5.0), torch.zeros(1)).double()
    few = FewSteps("target_driven", steps=2, clipped_calls=1)
    asked = []

    def denoise(x, t, s):
        asked.append((x, t))
        return MixtureDenoiser(far, VP)(x, t)

    z = torch.full((1, 1), 0.7, dtype=torch.float64)
    x0 = sample_few_steps(few, denoise, z, VP, lambda x: None)
    # From z = alpha 5 + sigma eps, jump with x0 = 1 instead of 5.
    start, c = VP.at(999), VP.at(499)
    eps = (z - start.alpha * 5) / start.sigma
    torch.testing.assert_close(asked[1][0], c.alpha + c.sigma * eps)
    torch.testing.assert_close(x0, torch.full_like(z, 5.0))


def test_a_network_told_its_target_is_guided_by_text_alone():
    seen = []

    def denoiser(x, t, condition, **_):
        seen.append(condition)
        return MixtureDenoiser(GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1)).double(), VP)(x, t)

    condition, null = Condition(text=torch.ones(1, 3)), Condition(text=torch.zeros(1, 3))
    told = telling(denoiser, condition, null, 2.0, reads_target=True)
    x, t = torch.zeros(2, 1, dtype=torch.float64), torch.full((2,), 500.0, dtype=torch.float64)
    told(x, t, t - 100)
    assert torch.equal(seen[0]["target_time"], torch.full((4,), 400.0, dtype=torch.float64))
    assert seen[0]["text"][:, 0].tolist() == [0, 0, 1, 1]


def test_a_record_round_trips():
    few = FewSteps("trajectory", steps=2, eta=0.5, times=(999.0, 499.0), clipped_calls=1, clip_limit=2.0)
    assert FewSteps.from_dict(json.loads(json.dumps(few.to_dict()))) == few
    with pytest.raises(ValueError, match="no entry 'speed'"):
        FewSteps.from_dict({"sampler": "consistency", "speed": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "magic"}, "no few-step sampler 'magic'"),
        ({"steps": 0}, "at least 1 step, not 0"),
        ({"eta": 1.5}, r"fraction from 0 to 1, not 1\.5"),
        ({"times": (999.0,)}, "4 steps need 4 times, not 1"),
        ({"steps": 2, "times": (251.0, 999.0)}, r"calls descend, unlike \[251\.0, 999\.0\]"),
        ({"grid_steps": 3}, "grid of 3 times has no 4 steps"),
        ({"clip_limit": 0.5}, "limit of at least 1"),
    ],
)
def test_samplings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FewSteps(**{"sampler": "consistency", **options})


def test_options_of_few_step_samplers_need_one(tiny_sd):
    with pytest.raises(ValueError, match="eta belongs to the samplers consistency, target_driven, trajectory"):
        generate(open_model(tiny_sd), ["a cat"], steps=2, sampler="ddim", eta=0.5)


@pytest.mark.parametrize(
    ("name", "few", "message"),
    [
        ("tiny_sd", FewSteps("target_driven", clipped_calls=1), "leave out clipped_calls"),
        ("tiny_sd", FewSteps("consistency", steps=2, times=(999, 400.5)), "whole times"),
        ("tiny_sd", FewSteps("consistency", steps=2, times=(1200, 400)), "above -1 and up to 999"),
        ("tiny_unconditional", FewSteps("target_driven", eta=0.3), "cannot be told eta"),
        ("tiny_unconditional", FewSteps("consistency", steps=2, times=(999, 400)), "cannot be told timesteps"),
        ("tiny_dit", FewSteps("target_driven", eta=0.3), "DiTPipeline cannot be told eta"),
        ("tiny_class_conditional", FewSteps("consistency"), "cannot pass class labels"),
        ("tiny_edm", FewSteps("target_driven", eta=0.0), "set eta to 1"),
        ("tiny_sd3", FewSteps("target_driven", eta=0.3), "set eta to 0 or 1"),
    ],
)
def test_what_no_stock_scheduler_does_is_refused(request, name, few, message):
    model = open_model(request.getfixturevalue(name))
    with pytest.raises(ValueError, match=message):
        model.backbone.few_steps(model.pipeline, few)


@pytest.mark.parametrize("spaced", [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}])
def test_a_shifted_flow_keeps_its_shift_and_its_times(tiny_sd3, spaced):
    model = open_model(tiny_sd3)
    model.pipeline.scheduler.register_to_config(**spaced)
    few = FewSteps("target_driven")
    scheduler, call = flow_sampling(model.pipeline.scheduler, model.schedule, few)
    scheduler.set_timesteps(sigmas=call["sigmas"])
    assert scheduler.config.shift == model.schedule.shift == 3
    assert scheduler.sigmas.tolist() == pytest.approx([*few.call_times(model.schedule), 0.0])


@pytest.mark.parametrize("start", [2.3, 0.7, 80.0])
def test_a_pixel_student_keeps_its_noise_levels(tiny_edm, start):
    model = open_model(tiny_edm)
    few = FewSteps("consistency", steps=3, times=(start, start / 3, 0.002))
    stock = model.backbone.few_steps(model.pipeline, few)
    assert stock.few_steps.times[0] == stock.scheduler.config.sigma_max == start
    assert stock.few_steps.times == pytest.approx(few.times, rel=1e-3)
    stock.scheduler.set_timesteps(timesteps=stock.call["timesteps"])
    assert stock.scheduler.sigmas.tolist() == pytest.approx([*stock.few_steps.times, 0.0])
    # What the exported folder's schedule makes of them.
    assert stock.few_steps.call_times(EDM(sigma_max=start)) == stock.few_steps.times
