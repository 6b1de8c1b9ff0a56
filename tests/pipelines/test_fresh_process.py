"""Every kind of export in one fresh process of stock diffusers alone: it draws exactly what the student draws."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pictures import stock_arguments
from safetensors.torch import save_file
from students import (
    FEW_STEP_STUDENTS,
    GLOBAL_SEED,
    SEEDS,
    STUDENTS,
    few_step_images_of,
    few_step_student_of,
    images_of,
    stock_prompts,
    student_of,
    with_lora,
)

from sublimate.pipelines.export import export_lora, export_student
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.model import Model, open_model

pytestmark = pytest.mark.slow

# Base, a layer of another rank, start of the student.
LORAS = {
    "unet": ("tiny_sd_v", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 600),
    "flux": ("tiny_flux", "single_transformer_blocks.1.attn.to_k", 0.6),
}

FRESH_PROCESS = """
import json, sys
sys.modules["sublimate"] = None
import diffusers, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
jobs = json.load(open(sys.argv[1]))
for job in jobs:
    pipeline = DiffusionPipeline.from_pretrained(job["folder"])
    if job["lora"]:
        pipeline.load_lora_weights(job["lora"])
        scheduler = getattr(diffusers, job["scheduler"])
        pipeline.scheduler = scheduler.from_pretrained(job["lora"], subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in job["seeds"]]
    # Some stock flow pipelines draw their fresh noise from the global generator.
    torch.manual_seed(job["global_seed"])
    expected = load_file(job["expected"])
    pictures = {name: expected[name] for name in ("image", "mask_image") if name in expected}
    result = pipeline(**job["who"], **pictures, generator=generators, output_type="pt", **job["call"])
    images = torch.as_tensor(result.images if "images" in result else result.audios)
    expected = expected["images"]
    print("RESULT", job["name"], float((images - expected).abs().max()), type(pipeline).__name__)
assert not any(name.startswith("sublimate.") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, str]]:
    """Every export, opened and run by one fresh process that cannot import this library: (error, pipeline class)."""
    root = tmp_path_factory.mktemp("exports")
    jobs = []

    def job(name: str, model: Model, images: torch.Tensor, folder: Path, lora: Path | None, call: dict) -> None:
        save_file({"images": images.contiguous(), **stock_arguments(model, len(SEEDS))}, root / f"{name}.safetensors")
        shared = {"name": name, "seeds": SEEDS, "who": stock_prompts(model), "call": call, "global_seed": GLOBAL_SEED}
        if lora:
            config = json.loads((lora / "scheduler" / "scheduler_config.json").read_text())
            shared["scheduler"] = config["_class_name"]
        paths = {"folder": str(folder), "lora": lora and str(lora), "expected": str(root / f"{name}.safetensors")}
        jobs.append(shared | paths)

    for name, t in STUDENTS.items():
        model = open_model(request.getfixturevalue(name.partition("@")[0]))
        student = student_of(model)
        folder = export_student(model, student, root / name, t=t)
        call = json.loads((folder / "sublimate.json").read_text())["call"]
        job(name, model, images_of(model, student, t), folder, None, call)

    for name, (base, layer, t) in LORAS.items():
        model = open_model(request.getfixturevalue(base))
        student = with_lora(model, {layer: 3})
        folder = export_lora(model, student, root / f"{name}-lora", t=t)
        call = json.loads((folder / "sublimate.json").read_text())["call"]
        job(f"{name}-lora", model, images_of(model, student, t), request.getfixturevalue(base), folder, call)
        folder = export_student(model, student, root / f"{name}-merged")
        call = json.loads((folder / "sublimate.json").read_text())["call"]
        job(f"{name}-merged", model, images_of(model, student, None), folder, None, call)

    for name, few in FEW_STEP_STUDENTS.items():
        model = open_model(request.getfixturevalue(name.partition("#")[0]))
        student = few_step_student_of(model, name)
        folder = export_student(model, student, root / name, few_steps=few)
        record = json.loads((folder / "sublimate.json").read_text())
        images = few_step_images_of(model, student, FewSteps.from_dict(record["few_steps"]))
        job(name, model, images, folder, None, record["call"])

    base = request.getfixturevalue("tiny_sd")
    model = open_model(base)
    student, few = with_lora(model, {}), FewSteps("target_driven", eta=0.3, grid_steps=250, guidance_scale=1.7)
    folder = export_lora(model, student, root / "few-step-lora", few_steps=few)
    call = json.loads((folder / "sublimate.json").read_text())["call"]
    job(
        "few-step-lora",
        model,
        few_step_images_of(model, student, few),
        request.getfixturevalue("tiny_sd"),
        folder,
        call,
    )
    # The student of four steps, asked for one.
    one = replace(few, steps=1)
    call = {**call, "num_inference_steps": 1}
    job(
        "few-step-lora-in-one",
        model,
        few_step_images_of(model, student, one),
        request.getfixturevalue("tiny_sd"),
        folder,
        call,
    )

    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-c", FRESH_PROCESS, str(root / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return {name: (float(error), kind) for _, name, error, kind in lines}


@pytest.mark.parametrize("name", [*STUDENTS, *(f"{name}-{kind}" for name in LORAS for kind in ("lora", "merged"))])
def test_a_fresh_process_draws_the_students_x0(fresh, name):
    error, _ = fresh[name]
    assert error < 1e-5


@pytest.mark.parametrize("name", [*FEW_STEP_STUDENTS, "few-step-lora", "few-step-lora-in-one"])
def test_a_fresh_process_samples_in_few_steps_like_ours(fresh, name):
    error, _ = fresh[name]
    # Sana's linear attention sums without a softmax, so that rounding grows more from call to call.
    assert error < (5e-5 if name.startswith("tiny_sana") else 2e-5)


def test_pixel_students_are_saved_as_stock_pipelines(fresh):
    assert fresh["tiny_unconditional"][1] == "DDIMPipeline"
    assert fresh["tiny_unconditional#consistency"][1] == "DDPMPipeline"
    assert fresh["tiny_edm"][1] == "ConsistencyModelPipeline"
