"""What is exported must be opened by stock diffusers alone and draw exactly what the student draws."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from peft import LoraConfig, inject_adapter_in_model
from pictures import shown_to, stock_arguments
from safetensors.torch import load_file, save_file

from sublimate.diffusion.samplers import one_step
from sublimate.diffusion.schedules import RectifiedFlow
from sublimate.pipelines.export import LORA_FILE, export_lora, export_student, save_model
from sublimate.pipelines.few_steps import FewSteps, sample_few_steps
from sublimate.pipelines.generate import generate, telling
from sublimate.pipelines.model import Model, open_model
from sublimate.pipelines.sound import waveforms

SEEDS = (11, 12)
PROMPTS = ("a red cat", "a painting in the style of van gogh")
# Of one length, since a stock audio pipeline pads, and padding changes what its language model says.
SOUNDS = ("a red cat", "a red dog")

# Family, start of the student; None is the schedule's end.
STUDENTS = {
    "tiny_sd": None,
    "tiny_sd@399": 399,
    "tiny_sd_v": None,
    "tiny_sd_v@750": 750,
    "tiny_inpainting": None,
    "tiny_inpainting@399": 399,
    "tiny_upscaling": None,
    "tiny_upscaling@750": 750,
    "tiny_unconditional": None,
    "tiny_unconditional@120": 120,
    "tiny_edm": None,
    "tiny_edm@2.5": 2.5,
    "tiny_sd3": None,
    "tiny_sd3@0.75": 0.75,
    "tiny_audio": None,
    "tiny_audio@399": 399,
}

# Students of several steps; "told" ones are told the guidance scale.
FEW_STEP_STUDENTS = {
    "tiny_sd#consistency": FewSteps("consistency", grid_steps=50),
    "tiny_sd_v#target_driven": FewSteps("target_driven", eta=0.3, grid_steps=250, guidance_scale=1.7),
    "tiny_sd#times": FewSteps("target_driven", steps=3, eta=0.2, times=(999, 875, 251), guidance_scale=2.0),
    "tiny_sd#deterministic": FewSteps("target_driven", grid_steps=250),
    "tiny_sd#one": FewSteps("target_driven", steps=1, eta=0.2, grid_steps=250, guidance_scale=3.0),
    "tiny_sd#told": FewSteps("consistency", steps=2, grid_steps=50, guidance_scale=8.0),
    "tiny_inpainting#times": FewSteps("target_driven", steps=3, eta=0.2, times=(999, 875, 251), guidance_scale=2.0),
    "tiny_upscaling#consistency": FewSteps("consistency", steps=3, grid_steps=50),
    "tiny_unconditional#consistency": FewSteps("consistency", steps=3, grid_steps=50),
    "tiny_edm#consistency": FewSteps("consistency", steps=3, grid_steps=18),
    "tiny_edm#one": FewSteps("consistency", steps=1),
    "tiny_sd3#deterministic": FewSteps("target_driven", steps=3, grid_steps=50, guidance_scale=2.0),
    "tiny_sd3#consistency": FewSteps("consistency", steps=3),
    "tiny_audio#consistency": FewSteps("consistency", steps=3, grid_steps=50),
    "tiny_audio#target_driven": FewSteps("target_driven", eta=0.3, grid_steps=250),
}
GLOBAL_SEED = 13

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
    who = {"prompt": job["prompts"]} if job["prompts"] else {"batch_size": len(generators)}
    # Stock flow pipelines draw their fresh noise from the global generator.
    torch.manual_seed(job["global_seed"])
    expected = load_file(job["expected"])
    pictures = {name: expected[name] for name in ("image", "mask_image") if name in expected}
    result = pipeline(**who, **pictures, generator=generators, output_type="pt", **job["call"])
    images = torch.as_tensor(result.images if "images" in result else result.audios)
    expected = expected["images"]
    print("RESULT", job["name"], float((images - expected).abs().max()), type(pipeline).__name__)
assert not any(name.startswith("sublimate.") for name in sys.modules)
"""


def student_of(model: Model):
    """The base's denoiser with other weights, far enough that the base itself would fail the comparison."""
    student = copy.deepcopy(model.denoiser)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student


def stock_draws(model: Model):
    """What the stock pipeline is told, its initial noise, and what it draws further noise with."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]

    def draw(shape):
        return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])

    condition = model.encode_prompts(prompts_of(model) or [""] * len(SEEDS))
    condition = condition.replace(**shown_to(model, len(SEEDS), draw))
    z = draw(model.latent_shape)
    if model.backbone.shown == "masks":
        draw(model.latent_shape)  # it samples the posterior of the masked image
    return condition, z, draw


@torch.no_grad()
def images_of(model: Model, student, t: float | None) -> torch.Tensor:
    condition, z, _ = stock_draws(model)
    return displayed(model, one_step(lambda x, t: student(x, t, condition), z, model.schedule, t))


def displayed(model: Model, x0: torch.Tensor) -> torch.Tensor:
    """What the stock pipeline returns: images, or waveforms."""
    media = model.render(x0)
    return waveforms(model, media)[0] if model.backbone.medium == "audio" else media


@torch.no_grad()
def few_step_images_of(model: Model, student, few: FewSteps) -> torch.Tensor:
    condition, z, draw = stock_draws(model)
    torch.manual_seed(GLOBAL_SEED)

    def noise(x):
        return torch.randn(x.shape) if isinstance(model.schedule, RectifiedFlow) else draw(x.shape[1:])

    reads = model.backbone.reads_guidance(student.network)
    denoise = telling(student, condition, model.null_condition(), few.guidance_scale, reads_guidance=reads)
    return displayed(model, sample_few_steps(few, denoise, z, model.schedule, noise))


def few_step_student_of(model: Model, name: str):
    """A student with other weights; "told" ones have a number input whose layer is not zero."""
    student = student_of(model)
    if name.endswith("#told"):
        student.network = model.backbone.with_number_input(student.network)
        torch.nn.init.normal_(
            student.network.time_embedding.cond_proj.weight, generator=torch.Generator().manual_seed(7)
        )
    return student


def prompts_of(model: Model) -> list[str]:
    if model.backbone.medium == "audio":
        return list(SOUNDS)
    return list(PROMPTS) if model.backbone.text_components else []


def with_lora(model: Model, ranks: dict[str, int]):
    """A student with non-zero adapters of mixed rank and a scale other than 1."""
    tree = copy.deepcopy(model.denoiser)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_k"], rank_pattern=ranks)
    tree = inject_adapter_in_model(config, tree)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in tree.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return tree


@pytest.fixture(scope="module")
def folders(request: pytest.FixtureRequest) -> dict[str, Path]:
    return {name: request.getfixturevalue(name) for name in {re.split("[@#]", key)[0] for key in STUDENTS}}


@pytest.fixture(scope="module")
def fresh(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, str]]:
    """Every export, opened and run by one fresh process that cannot import this library: (error, pipeline class)."""
    root = tmp_path_factory.mktemp("exports")
    jobs = []

    def job(name: str, model: Model, images: torch.Tensor, folder: Path, lora: Path | None, call: dict) -> None:
        save_file({"images": images.contiguous(), **stock_arguments(model, len(SEEDS))}, root / f"{name}.safetensors")
        shared = {"name": name, "seeds": SEEDS, "prompts": prompts_of(model), "call": call, "global_seed": GLOBAL_SEED}
        if lora:
            config = json.loads((lora / "scheduler" / "scheduler_config.json").read_text())
            shared["scheduler"] = config["_class_name"]
        paths = {"folder": str(folder), "lora": lora and str(lora), "expected": str(root / f"{name}.safetensors")}
        jobs.append(shared | paths)

    for name, t in STUDENTS.items():
        model = open_model(folders[name.partition("@")[0]])
        student = student_of(model)
        folder = export_student(model, student, root / name, t=t)
        call = json.loads((folder / "sublimate.json").read_text())["call"]
        job(name, model, images_of(model, student, t), folder, None, call)

    model = open_model(folders["tiny_sd_v"])
    student = with_lora(model, {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": 3})
    call = {"num_inference_steps": 1, "guidance_scale": 1.0}
    folder = export_lora(model, student, root / "lora", t=600)
    job("lora", model, images_of(model, student, 600), folders["tiny_sd_v"], folder, call)
    folder = export_student(model, student, root / "merged")
    job("merged", model, images_of(model, student, None), folder, None, call)

    for name, few in FEW_STEP_STUDENTS.items():
        model = open_model(folders[name.partition("#")[0]])
        student = few_step_student_of(model, name)
        folder = export_student(model, student, root / name, few_steps=few)
        record = json.loads((folder / "sublimate.json").read_text())
        images = few_step_images_of(model, student, FewSteps.from_dict(record["few_steps"]))
        job(name, model, images, folder, None, record["call"])

    model = open_model(folders["tiny_sd"])
    student, few = with_lora(model, {}), FewSteps("target_driven", eta=0.3, grid_steps=250, guidance_scale=1.7)
    folder = export_lora(model, student, root / "few-step-lora", few_steps=few)
    call = json.loads((folder / "sublimate.json").read_text())["call"]
    job("few-step-lora", model, few_step_images_of(model, student, few), folders["tiny_sd"], folder, call)
    # The student of four steps, asked for one.
    one = replace(few, steps=1)
    call = {**call, "num_inference_steps": 1}
    job("few-step-lora-in-one", model, few_step_images_of(model, student, one), folders["tiny_sd"], folder, call)

    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-c", FRESH_PROCESS, str(root / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return {name: (float(error), kind) for _, name, error, kind in lines}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STUDENTS, "lora", "merged"])
def test_a_fresh_process_draws_the_students_x0(fresh, name):
    error, _ = fresh[name]
    assert error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FEW_STEP_STUDENTS, "few-step-lora", "few-step-lora-in-one"])
def test_a_fresh_process_samples_in_few_steps_like_ours(fresh, name):
    error, _ = fresh[name]
    assert error < 2e-5


@pytest.mark.slow
def test_pixel_students_are_saved_as_stock_pipelines(fresh):
    assert fresh["tiny_unconditional"][1] == "DDIMPipeline"
    assert fresh["tiny_unconditional#consistency"][1] == "DDPMPipeline"
    assert fresh["tiny_edm"][1] == "ConsistencyModelPipeline"


@pytest.mark.parametrize("name", STUDENTS)
def test_an_export_opens_as_a_model_that_samples_alike(folders, tmp_path, name):
    t = STUDENTS[name]
    model = open_model(folders[name.partition("@")[0]])
    student = student_of(model)
    again = open_model(export_student(model, student, tmp_path / "student", t=t))
    assert again.content_hash() != model.content_hash()
    prompts = prompts_of(model) or len(SEEDS)
    shown = shown_to(model, len(SEEDS))
    drawn = generate(again, prompts, seed=3, shown=shown)
    model.denoiser.load_state_dict(student.state_dict())
    expected = generate(model, prompts, seed=3, steps=1, guidance_scale=1, sampler="one_step", start=t, shown=shown)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FEW_STEP_STUDENTS)
def test_a_few_step_export_opens_as_a_model_that_samples_alike(folders, tmp_path, name):
    few = FEW_STEP_STUDENTS[name]
    model = open_model(folders[name.partition("#")[0]])
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


def test_what_is_no_student_is_sampled_as_its_base(tiny_sd, tmp_path):
    student = student_of(model := open_model(tiny_sd))
    again = open_model(export_student(model, student, tmp_path / "tuned", as_base=True))
    assert not re.search("One-step|single network|distillation", (tmp_path / "tuned" / "README.md").read_text())
    drawn = generate(again, PROMPTS, steps=3, guidance_scale=2.0)
    model.denoiser = student
    torch.testing.assert_close(drawn, generate(model, PROMPTS, steps=3, guidance_scale=2.0), atol=2e-5, rtol=0)


def test_the_base_keeps_its_weights_scheduler_and_config(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    before, scheduler = model.content_hash(), dict(model.pipeline.scheduler.config)
    export_student(model, with_lora(model, {}), tmp_path / "student", t=200)
    assert model.content_hash() == before
    assert dict(model.pipeline.scheduler.config) == scheduler


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


def test_a_student_that_predicts_something_else_is_refused(tiny_sd, tiny_sd_v, tmp_path):
    model = open_model(tiny_sd)
    with pytest.raises(ValueError, match=r"parametrization differs.*attachment"):
        export_student(model, open_model(tiny_sd_v).denoiser, tmp_path / "student")


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
