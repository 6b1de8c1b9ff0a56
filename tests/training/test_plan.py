"""The counted plan of a run against the same step taken with real tensors."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from memory import kept_bytes, most_allocated
from torch.utils.flop_counter import FlopCounterMode

from sublimate.diffusion.conditions import Condition
from sublimate.pipelines import locations
from sublimate.pipelines.gradient_checkpointing import checkpointed
from sublimate.pipelines.model import open_model
from sublimate.pipelines.shapes import open_shapes
from sublimate.training import registry
from sublimate.training.config import validate_section
from sublimate.training.data import ModelSource
from sublimate.training.distill import OBJECTIVES, DistillConfig
from sublimate.training.objective import Objective
from sublimate.training.plan import CPU_ATTENTION, Meter, plan_distillation
from sublimate.training.trainer import Trainer

LORA = {"kind": "lora", "rank": 4}
SMALL = {"critic_updates": 1, "discriminator_width": 8}


def configured(folder, tmp_path, method="f_distill", objective=None, dtype="float32", **trainer):
    return DistillConfig(
        model=str(folder),
        dtype=dtype,
        method=method,
        objective=SMALL if objective is None else objective,
        trainer={"output_dir": tmp_path, "train_batch_size": 2, "ema_decay": 0.9, **trainer},
    )


def real_trainer(config):
    model = open_model(config.model, dtype=getattr(torch, config.dtype))
    method = registry.load(OBJECTIVES, config.method, Objective)
    objective = method(model, validate_section(method.Config, config.objective))
    source = ModelSource(model, ["a"], torch.zeros(1, *model.latent_shape))
    return model, Trainer(objective, source, config.trainer, progress=False)


@pytest.mark.slow
def test_shapes_know_sizes_and_no_values(tiny_sd):
    shapes, model = open_shapes(tiny_sd), open_model(tiny_sd)
    told = {key: (p.shape, p.dtype) for key, p in shapes.parameters().items()}
    assert told == {key: (p.shape, p.dtype) for key, p in model.parameters().items()}
    assert shapes.latent_shape == model.latent_shape and shapes.schedule.t_max == model.schedule.t_max
    x0 = shapes.denoiser(torch.zeros(3, *shapes.latent_shape), 500.0, shapes.encode_prompts(["a cat"])).x0
    assert x0.shape == (3, *model.latent_shape)
    with pytest.raises(Exception, match="_local_scalar_dense"):
        float(x0.sum())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_unconditional", "tiny_audio"])
def test_shapes_of_other_families(request, family):
    folder = request.getfixturevalue(family)
    shapes, model = open_shapes(folder), open_model(folder)
    assert {k: p.shape for k, p in shapes.parameters().items()} == {k: p.shape for k, p in model.parameters().items()}


@pytest.mark.slow
def test_copies_of_shapes_leave_an_interpreter_that_ends_well(tiny_sd_v):
    lines = (
        "import copy, gc",
        "from sublimate.pipelines.shapes import open_shapes",
        f"copy.deepcopy(open_shapes({str(tiny_sd_v)!r}).denoiser)",
        "gc.collect()",
    )
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)]).returncode == 0


def test_one_file_has_no_shapes(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="give a folder"):
        open_shapes(tmp_path / "model.safetensors")


@pytest.mark.slow
def test_shapes_of_a_hub_id_fetch_no_weights(tiny_sd, monkeypatch):
    asked = {}

    def snapshot(name, **options):
        asked.update(options, name=name)
        return str(tiny_sd)

    monkeypatch.setattr(locations, "snapshot_download", snapshot)
    assert open_shapes("owner/name").source == "owner/name" == asked["name"]
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])


def test_a_storage_counts_once_and_until_it_is_freed():
    with Meter() as meter:
        a = torch.zeros(1000)
        b = a[10:].view(-1, 10)
        assert meter.now == meter.peak == 4000
        c = a + 1
        assert meter.now == 8000
        del a, c
        assert (meter.now, meter.peak) == (4000, 8000)
        del b
        assert meter.now == 0
        meter.reset_peak()
        assert meter.peak == 0


@pytest.mark.slow
def test_players_cost_what_they_do_not_share(tiny_sd_v, tmp_path):
    found = plan_distillation(configured(tiny_sd_v, tmp_path, objective={**SMALL, "student": LORA}))
    model, trainer = real_trainer(configured(tiny_sd_v, tmp_path, objective={**SMALL, "student": LORA}))
    assert found.base == sum(p.numel() * 4 for p in model.parameters().values())
    network = sum(p.numel() * 4 for p in model.denoiser.parameters())
    trained = sum(p.numel() * 4 for p in trainer.players["student"].trainable().values())
    student, critic = found.players["student"], found.players["critic"]
    assert student.weights == student.gradients == student.average == trained < network
    assert critic.weights == critic.gradients == network and critic.average == 0
    # Two moments, and a count of steps for each tensor.
    steps = 4 * len(trainer.players["critic"].trainable())
    assert critic.optimizer == 2 * network + steps


CASES = {
    "full": {},
    "lora-bf16": {"objective": {**SMALL, "student": LORA, "critic": LORA}, "mixed_precision": "bf16"},
    "lora-over-bf16": {
        "objective": {**SMALL, "student": LORA, "critic": LORA},
        "mixed_precision": "bf16",
        "dtype": "bfloat16",
    },
    "checkpointed-accumulated": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    # Gradients pass through the teacher.
    "checkpointed-teacher": {"method": "score_identity", "objective": {}, "gradient_checkpointing": True},
    "consistency": {"method": "consistency_distillation", "objective": {"guidance_input": False}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_what_torchs_allocator_reports_of_a_real_step(tiny_sd_v, tmp_path, case):
    config = configured(tiny_sd_v, tmp_path, **CASES[case])
    found = plan_distillation(config)
    model, trainer = real_trainer(config)
    with checkpointed(model) if config.trainer.gradient_checkpointing else nullcontext():
        for turn in trainer.objective.turns(0):  # Adam's moments
            trainer.accumulate(turn)
            trainer.update(turn)
        before = kept_bytes(model, trainer)
        for turn in trainer.objective.turns(1):
            peak = before + most_allocated(lambda turn=turn: (trainer.accumulate(turn), trainer.update(turn)))
            assert found.turns[turn.name].peak == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
def test_turns_that_are_alike_are_counted_once_and_cost_what_all_of_them_take(tiny_sd_v, tmp_path):
    config = configured(tiny_sd_v, tmp_path, objective={**SMALL, "critic_updates": 3})
    found = plan_distillation(config)
    assert {name: turn.times for name, turn in found.turns.items()} == {"critic0": 3, "student": 1}
    assert any(line.startswith("turn critic0: 3 times ") for line in found.lines())
    _, trainer = real_trainer(config)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        for turn in trainer.objective.turns(0):
            trainer.accumulate(turn)
    assert found.flops == counter.get_total_flops()


@pytest.mark.slow
def test_networks_whose_answers_are_stored_are_not_held(tiny_sd_v, tmp_path):
    config = configured(tiny_sd_v, tmp_path, "denoising", {})
    stored = config.model_copy(update={"data": config.data.model_copy(update={"cache_dir": tmp_path})})
    whole, parked = plan_distillation(config), plan_distillation(stored)
    encoders = [module for name, module in open_model(tiny_sd_v).components().items() if name != "unet"]
    size = sum(p.numel() * 4 for module in encoders for p in module.parameters())
    assert whole.base - parked.base == whole.peak - parked.peak == size > 0


@pytest.mark.slow
def test_a_machine_with_an_accelerator_counts_too(tiny_sd_v, tmp_path, monkeypatch):
    config = configured(tiny_sd_v, tmp_path, "denoising", {})
    here = plan_distillation(config)
    monkeypatch.setattr(Accelerator, "device", property(lambda _: torch.device("cuda")))
    assert plan_distillation(config) == here


@pytest.mark.slow
def test_every_phase_of_a_method_is_planned_once(tiny_sd_v, tmp_path):
    stages = {"degradation_steps": 2, "record_every": 1, "backtrack_every": 1, "critic_updates": 1}
    critic = {"critic": {"kind": "lora", "rank": 2}}
    found = plan_distillation(configured(tiny_sd_v, tmp_path, "disback", {**stages, **critic}))
    # The teacher's turn as the last target costs what its nodes' do.
    assert found.turns.keys() == {"critic0"} and {step: set(turns) for step, turns in found.later.items()} == {
        2: {"critic0", "student"}
    }
    assert found.peak == found.later[2]["student"].peak > found.turns["critic0"].peak
    assert found.flops == sum(turn.flops for turn in found.later[2].values())
    assert any(line.startswith("from step 2, turn student: ") for line in found.lines())
    found = plan_distillation(configured(tiny_sd_v, tmp_path, "speedupnet", {"stage1_steps": 2}))
    assert found.later.keys() == {2} and found.later[2]["adapter"].flops > found.turns["adapter"].flops


@pytest.mark.slow
def test_operations_of_a_pass_are_counted_with_attention(tiny_sd_v, tmp_path):
    one = plan_distillation(configured(tiny_sd_v, tmp_path, **CASES["consistency"])).flops
    two = plan_distillation(configured(tiny_sd_v, tmp_path, **CASES["consistency"], train_batch_size=4)).flops
    assert two == 2 * one > 0
    written = configured(tiny_sd_v, tmp_path, **CASES["consistency"]).model_copy(update={"attention": "math"})
    # Scores written out are two products of matrices for each of the fused kernel's, and take memory besides.
    assert plan_distillation(written).flops == pytest.approx(one, rel=0.02)


@pytest.mark.slow
def test_a_condition_without_text_is_planned_too(tiny_unconditional, tmp_path):
    config = configured(tiny_unconditional, tmp_path, objective={**SMALL, "guidance_scale": 1.0})
    assert plan_distillation(config).peak > 0
    assert open_shapes(tiny_unconditional).null_condition() == Condition()
