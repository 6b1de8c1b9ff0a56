"""Every kind of export in one fresh process of stock diffusers alone: it draws exactly what the student draws."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from fresh import FreshProcess
from students import (
    FEW_STEP_STUDENTS,
    STUDENTS,
    few_step_images_of,
    few_step_student_of,
    images_of,
    student_of,
    with_lora,
)

from sublimate.pipelines.export import export_lora, export_student
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.model import open_model

pytestmark = pytest.mark.slow

# Base, a layer of another rank, start of the student.
LORAS = {
    "unet": ("tiny_sd_v", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 600),
    "flux": ("tiny_flux", "single_transformer_blocks.1.attn.to_k", 0.6),
}


@pytest.fixture(scope="module")
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, str]]:
    """Every export, opened and run by one fresh process that cannot import this library: (error, pipeline class)."""
    root = tmp_path_factory.mktemp("exports")
    process = FreshProcess(root)

    for name, t in STUDENTS.items():
        model = open_model(request.getfixturevalue(name.partition("@")[0]))
        student = student_of(model)
        folder = export_student(model, student, root / name, t=t)
        process.add(name, model, images_of(model, student, t), folder)

    for name, (base, layer, t) in LORAS.items():
        folder = request.getfixturevalue(base)
        model = open_model(folder)
        student = with_lora(model, {layer: 3})
        lora = export_lora(model, student, root / f"{name}-lora", t=t)
        process.add(f"{name}-lora", model, images_of(model, student, t), folder, lora=lora)
        folder = export_student(model, student, root / f"{name}-merged")
        process.add(f"{name}-merged", model, images_of(model, student, None), folder)

    for name, few in FEW_STEP_STUDENTS.items():
        model = open_model(request.getfixturevalue(name.partition("#")[0]))
        student = few_step_student_of(model, name)
        folder = export_student(model, student, root / name, few_steps=few)
        record = json.loads((folder / "sublimate.json").read_text())
        process.add(name, model, few_step_images_of(model, student, FewSteps.from_dict(record["few_steps"])), folder)

    base = request.getfixturevalue("tiny_sd")
    model = open_model(base)
    student, few = with_lora(model, {}), FewSteps("target_driven", eta=0.3, grid_steps=250, guidance_scale=1.7)
    lora = export_lora(model, student, root / "few-step-lora", few_steps=few)
    process.add("few-step-lora", model, few_step_images_of(model, student, few), base, lora=lora)
    # The student of four steps, asked for one.
    call = {**json.loads((lora / "sublimate.json").read_text())["call"], "num_inference_steps": 1}
    images = few_step_images_of(model, student, replace(few, steps=1))
    process.add("few-step-lora-in-one", model, images, base, call, lora=lora)
    return process.run()


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
