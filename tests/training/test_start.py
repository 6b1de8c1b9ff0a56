"""A second stage starts with the student of the first."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sublimate.pipelines.model import open_model
from sublimate.training.distill import DistillConfig, distill

LORA = {"kind": "lora", "rank": 2, "lora_alpha": 6, "learning_rate": 1e-2}
FULL = {"kind": "full", "learning_rate": 1e-2}
STILL = {"learning_rate": 1e-30, "adam_weight_decay": 0.0}


def configured(tmp_path, model, name, player, *, method="f_distill", objective=None, **options):
    (tmp_path / "prompts.txt").write_text("red cat\na dog\n")
    small = {"critic_updates": 1, "divergence": "reverse_kl", "gan_weight": 0.0, "student": player, "critic": FULL}
    return DistillConfig(
        model=str(model),
        method=method,
        objective=small if objective is None else objective,
        data={"prompts": str(tmp_path / "prompts.txt"), "images": "teacher", "teacher_steps": 1},
        trainer={"output_dir": tmp_path / name, "max_train_steps": 2, "train_batch_size": 2},
        **options,
    )


def weights(folder):
    return {key: v for file in sorted(folder.rglob("*.safetensors")) for key, v in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("player", [FULL, LORA], ids=["full", "lora"])
def test_a_student_starts_as_the_one_it_is_told(tiny_sd, tmp_path, player):
    first = distill(configured(tmp_path, tiny_sd, "first", player), progress=False)
    unmoved = configured(tmp_path, tiny_sd, "second", {**player, **STILL}, student_from=str(first))
    second = distill(unmoved, progress=False)
    before, after = weights(first), weights(second)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=0)
    teacher = distill(configured(tmp_path, tiny_sd, "third", {**player, **STILL}), progress=False)
    assert any(not torch.equal(value, after[name]) for name, value in weights(teacher).items())
    assert "\nstudent_from: student\n" in json.loads((second / "sublimate.json").read_text())["provenance"]["config"]


@pytest.mark.slow
def test_a_files_own_scale_is_heeded(tiny_sd, tmp_path):
    first = distill(configured(tmp_path, tiny_sd, "first", LORA), progress=False)
    state = load_file(first / "pytorch_lora_weights.safetensors")
    # PEFT's own: alpha is in the header, and B without it.
    told = {"unet.r": 2, "unet.lora_alpha": 8}
    unscaled = {key: (value / 4 if "lora_B" in key else value) for key, value in state.items()}
    save_file(unscaled, tmp_path / "peft.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(told)})
    unmoved = {**LORA, **STILL}
    second = distill(
        configured(tmp_path, tiny_sd, "second", unmoved, student_from=str(tmp_path / "peft.safetensors")),
        progress=False,
    )
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(second)[name], value, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_another_start_is_another_run(tiny_sd, tmp_path):
    first = distill(configured(tmp_path, tiny_sd, "first", FULL), progress=False)
    config = configured(tmp_path, tiny_sd, "second", FULL, student_from=str(first))
    saving = config.trainer.model_copy(update={"checkpointing_steps": 1})
    distill(config.model_copy(update={"trainer": saving}), progress=False)
    with pytest.raises(ValueError, match="was made for another model, data or options"):
        distill(config.model_copy(update={"trainer": saving, "student_from": str(tiny_sd)}), progress=False)


@pytest.mark.slow
def test_what_cannot_be_started_from_is_refused(tiny_sd, tiny_sd_v, tiny_unconditional, tmp_path):
    lora = distill(configured(tmp_path, tiny_sd, "lora", LORA), progress=False)

    def refused(player, source, sentence, **options):
        with pytest.raises(ValueError, match=sentence):
            distill(configured(tmp_path, tiny_sd, "run", player, student_from=str(source), **options), progress=False)

    refused(FULL, tiny_unconditional, r"The student in .* does not fit this run: .* Give objective.student the same")
    refused(FULL, tiny_sd_v, "predicts something else than the teacher's")
    refused({**LORA, "rank": 3}, lora, r"student in .*lora/student does not fit this run: .* has shape")
    refused({**LORA, "target_modules": ("to_q",)}, lora, "does not fit this run: .* names differ")
    refused(LORA, tiny_sd, "holds no LoRA to start from")
    refused(LORA, lora / "kohya.safetensors", "has no LoRA of the unet by PEFT's names: give the folder of one")
    guidance = {"method": "discriminator_guidance", "objective": {"discriminator_width": 8}}
    refused(FULL, tiny_sd, "discriminator_guidance trains no student of its own", **guidance)
    assert open_model(tiny_sd).loras == ()
