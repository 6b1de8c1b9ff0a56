"""What is exported must be opened by stock diffusers alone and draw exactly what the student draws."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from diffusers import UNet2DModel
from peft import LoraConfig, inject_adapter_in_model
from pictures import shown_to
from safetensors.torch import load_file
from students import (
    FEW_STEP_STUDENTS,
    PROMPTS,
    SEEDS,
    STUDENTS,
    few_step_student_of,
    images_of,
    prompts_of,
    student_of,
    with_lora,
)

from sublimate.pipelines.export import export_lora, export_student, save_model
from sublimate.pipelines.generate import generate
from sublimate.pipelines.lora_files import KOHYA_FILE, LORA_FILE, kohya_state
from sublimate.pipelines.model import Model, open_model

# The quick suite takes the students that start at the end of the schedule, and one of each few-step kind.
QUICK = {
    "tiny_sd#consistency",
    "tiny_sd_v#target_driven",
    "tiny_sd#told",
    "tiny_flux#told",
    *(n for n in STUDENTS if "@" not in n),
}
ROWS, FEW_STEP_ROWS = (
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]
    for names in (STUDENTS, FEW_STEP_STUDENTS)
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_an_export_opens_as_a_model_that_samples_alike(request, tmp_path, name):
    t = STUDENTS[name]
    model = open_model(request.getfixturevalue(name.partition("@")[0]))
    student = student_of(model)
    again = open_model(export_student(model, student, tmp_path / "student", t=t))
    assert again.content_hash() != model.content_hash()
    prompts = prompts_of(model) or len(SEEDS)
    shown = shown_to(model, len(SEEDS))
    drawn = generate(again, prompts, seed=3, shown=shown)
    model.denoiser.load_state_dict(student.state_dict())
    expected = generate(model, prompts, seed=3, steps=1, guidance_scale=1, sampler="one_step", start=t, shown=shown)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW_STEP_ROWS)
def test_a_few_step_export_opens_as_a_model_that_samples_alike(request, tmp_path, name):
    few = FEW_STEP_STUDENTS[name]
    model = open_model(request.getfixturevalue(name.partition("#")[0]))
    student = few_step_student_of(model, name)
    again = open_model(export_student(model, student, tmp_path / "student", few_steps=few))
    assert (again.defaults["steps"], again.guidance_scale) == (few.steps, few.guidance_scale)
    card = (tmp_path / "student" / "README.md").read_text()
    assert f"eta={few.eta}" in card or "target_driven" not in name
    assert ("few-step" in card.lower()) == (few.steps > 1)
    shown = shown_to(model, len(SEEDS))
    drawn = generate(again, prompts_of(model) or len(SEEDS), seed=3, shown=shown)
    model.pipeline.unet = student.network  # where it is one
    ours = Model(model.pipeline, "student", {"few_steps": few.to_dict(), "guidance_scale": few.guidance_scale})
    ours.denoiser = student
    tolerance = 1e-3 if name.startswith("tiny_edm") else 2e-5  # its scheduler rounds the times
    expected = generate(ours, prompts_of(model) or len(SEEDS), seed=3, shown=shown)
    torch.testing.assert_close(drawn, expected, atol=tolerance, rtol=0)


@pytest.mark.slow
def test_what_is_no_student_is_sampled_as_its_base(tiny_sd, tmp_path):
    student = student_of(model := open_model(tiny_sd))
    again = open_model(export_student(model, student, tmp_path / "tuned", as_base=True))
    assert not re.search("One-step|single network|distillation", (tmp_path / "tuned" / "README.md").read_text())
    drawn = generate(again, PROMPTS, steps=3, guidance_scale=2.0)
    model.denoiser = student
    torch.testing.assert_close(drawn, generate(model, PROMPTS, steps=3, guidance_scale=2.0), atol=2e-5, rtol=0)


@pytest.mark.slow
def test_what_is_tuned_from_a_student_starts_where_it_does(tiny_sd3, tmp_path):
    model = open_model(tiny_sd3)
    student = open_model(export_student(model, student_of(model), tmp_path / "student", t=0.7))
    tuned = open_model(export_student(student, student.denoiser, tmp_path / "tuned", as_base=True))
    assert torch.equal(generate(tuned, PROMPTS), generate(student, PROMPTS))


@pytest.mark.slow
def test_the_base_keeps_its_weights_scheduler_and_config(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    before, scheduler = model.content_hash(), dict(model.pipeline.scheduler.config)
    export_student(model, with_lora(model, {}), tmp_path / "student", t=200)
    assert model.content_hash() == before
    assert dict(model.pipeline.scheduler.config) == scheduler


@pytest.mark.slow
def test_adapters_are_merged_into_a_copy(tiny_sd, tmp_path):
    # A player's tree shares the base's storage: merging in place would change the teacher.
    model = open_model(tiny_sd)
    before = model.content_hash()
    memo = {id(p): p for p in model.denoiser.parameters()}
    student = inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), copy.deepcopy(model.denoiser, memo))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.add_(0.5 if ".lora_" in name else 0.0)
    expected = images_of(model, student, None)
    export_student(model, student, tmp_path / "student")
    assert model.content_hash() == before
    assert torch.equal(images_of(model, student, None), expected)
    assert any(".lora_" in name for name, _ in student.named_parameters())


@pytest.mark.slow
def test_a_lora_file_has_one_rank_and_no_scale(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    folder = export_lora(model, with_lora(model, {name: 3}), tmp_path / "lora")
    state = load_file(folder / LORA_FILE)
    assert {len(value) for key, value in state.items() if key.endswith("lora_A.weight")} == {3}
    assert f"unet.{name}.lora_B.weight" in state
    assert "Kind: lora" in (folder / "README.md").read_text()


def test_a_network_without_adapters_has_no_lora(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    with pytest.raises(ValueError, match="no LoRA layers"):
        export_lora(model, model.denoiser, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("name", "t"), [("tiny_sd", 399.5), ("tiny_sd", 1000), ("tiny_edm", 0.0), ("tiny_sd3", 1.5), ("tiny_sd3", 0.0)]
)
def test_a_start_without_stock_scheduler_is_refused(request, tmp_path, name, t):
    model = open_model(request.getfixturevalue(name))
    with pytest.raises(ValueError, match="one-step student"):
        export_student(model, model.denoiser, tmp_path / "student", t=t)


def test_a_student_with_extra_parameters_is_refused(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    student = copy.deepcopy(model.denoiser)
    student.network.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.bias.*attachment"):
        export_student(model, student, tmp_path / "student")


@pytest.mark.slow
def test_a_student_that_predicts_something_else_is_refused(tiny_sd, tiny_sd_v, tmp_path):
    model = open_model(tiny_sd)
    with pytest.raises(ValueError, match=r"parametrization differs.*attachment"):
        export_student(model, open_model(tiny_sd_v).denoiser, tmp_path / "student")


@pytest.mark.slow
def test_a_model_is_saved_as_it_is(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    with torch.no_grad():
        model.parameters()["text_encoder/final_layer_norm.bias"].add_(1)
    given = {"base": {"source": "somewhere", "content_hash": "abc"}, "method": "esd"}
    folder = save_model(model, tmp_path / "edited", provenance=given)
    again = open_model(folder)
    assert again.content_hash() == model.content_hash()
    assert dict(again.pipeline.scheduler.config) == dict(model.pipeline.scheduler.config)
    record = json.loads((folder / "sublimate.json").read_text())
    assert record["content_hash"] == model.content_hash()
    assert record["provenance"].items() >= given.items()


@pytest.mark.slow
def test_a_saved_student_stays_a_student(tiny_sd_v, tmp_path):
    model = open_model(tiny_sd_v)
    student = open_model(export_student(model, student_of(model), tmp_path / "student", t=700))
    again = open_model(save_model(student, tmp_path / "edited"))
    assert (again.defaults["start"], again.defaults["steps"], again.guidance_scale) == (700, 1, 1)
    assert "num_inference_steps=1" in (tmp_path / "edited" / "README.md").read_text()
    assert torch.equal(generate(again, ["a cat"]), generate(student, ["a cat"]))


def test_pixel_students_that_no_stock_pipeline_runs_are_refused(tiny_unconditional, tmp_path):
    for option, message in (({"num_class_embeds": 3}, "class labels"), ({"out_channels": 6}, "variance")):
        model = open_model(tiny_unconditional)
        model.pipeline.unet = UNet2DModel.from_config(model.pipeline.unet.config, **option)
        model = Model(model.pipeline, "odd")
        condition = model.encode_prompts(["2"] if "num_class_embeds" in option else [""])
        output = model.denoiser(torch.zeros(1, 3, 8, 8), 10, condition).output
        assert output.shape == (1, 3, 8, 8)
        with pytest.raises(ValueError, match=message):
            export_student(model, model.denoiser, tmp_path / "student")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
def test_kohyas_layout_is_the_same_lora_for_stock_diffusers_too(request, tmp_path, family):
    model, folder = open_model(request.getfixturevalue(family)), request.getfixturevalue(family)
    names = [f"mid_block.attentions.0.transformer_blocks.0.attn2.{layer}" for layer in ("to_k", "to_q")]
    exported = export_lora(model, with_lora(model, dict.fromkeys(names, 3)), tmp_path / "lora")
    state = load_file(exported / KOHYA_FILE)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
    assert float(state[f"{name}.alpha"]) == len(state[f"{name}.lora_down.weight"]) == 3
    weights = []
    for file in (LORA_FILE, KOHYA_FILE):
        pipeline = type(model.pipeline).from_pretrained(folder)
        before = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
        pipeline.load_lora_weights(exported, weight_name=file)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        weights.append(pipeline.unet.state_dict())
        assert not torch.equal(weights[-1][f"{names[0]}.weight"], before[f"{names[0]}.weight"])
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=0)


def test_kohyas_layout_knows_text_encoders_and_no_transformers():
    pair = {"lora_A.weight": torch.ones(2, 3), "lora_B.weight": torch.ones(4, 2)}
    one = kohya_state({f"text_encoder.layers.0.q_proj.{key}": value for key, value in pair.items()})
    assert set(one) == {f"lora_te_layers_0_q_proj.{x}" for x in ("lora_down.weight", "lora_up.weight", "alpha")}
    both = {f"{encoder}.a.{key}": v for encoder in ("text_encoder", "text_encoder_2") for key, v in pair.items()}
    assert {key.partition("_a.")[0] for key in kohya_state(both)} == {"lora_te1", "lora_te2"}
    with pytest.raises(ValueError, match="no layers of a transformer"):
        kohya_state({"transformer.x.lora_A.weight": torch.ones(2, 3)})
