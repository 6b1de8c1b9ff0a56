"""The one-step student that ships with the package: it opens by name, draws in one step, and obeys."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from sublimate.evaluation.agreement import agreement
from sublimate.evaluation.detectors import open_detector
from sublimate.evaluation.ink_study import ink_prompts
from sublimate.pipelines.generate import generate, generate_latents
from sublimate.pipelines.locations import packaged_folder
from sublimate.pipelines.model import open_model
from sublimate.training.ink.captions import prompts

NAME = "ink_one_step"


@pytest.mark.slow
def test_it_obeys_in_a_single_step():
    student, asked = open_model(NAME), ink_prompts(prompts(400, 3))
    passes = []
    student.denoiser.network.register_forward_hook(lambda module, args, out: passes.append(len(args[0])))
    found = agreement(open_detector("ink"), generate(student, asked.texts, seed=3), asked.expected)
    assert sum(passes) == 400
    # About 97 % and 7 % (README): five standard errors away.
    assert found.together.value > 0.92 and found.rejected.value < 0.13


@pytest.mark.slow
def test_stock_diffusers_draws_the_same_image():
    folder = packaged_folder(NAME)
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "latents": z, "output_type": "pt"}
    images = pipeline("a neon seven in red", **call).images
    student = open_model(NAME)
    ours = student.render(generate_latents(student, ["a neon seven in red"], z=z))
    torch.testing.assert_close(images, ours, atol=1e-4, rtol=0)


def test_what_ships_stays_small():
    assets = Path(packaged_folder(NAME)).parent
    assert sum(file.stat().st_size for file in assets.rglob("*") if file.is_file()) < 25e6
