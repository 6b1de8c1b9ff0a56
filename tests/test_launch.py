"""`accelerate launch` with the packaged configurations: two processes on the CPU, over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vision
import yaml
from captioned_sets import image_folder
from processes import launch
from safetensors.torch import load_file

from sublimate.cli.app import run

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def launched(name, *command):
    """Runs sublimate in two processes, with one of `configs/accelerate/`."""
    config = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    run = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*run, "--main_process_port", "0", "-m", "sublimate.cli", *command]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TRAINED = """
import sys
from sublimate.training.config import load_config
from sublimate.training.distill import DistillConfig, distill

distill(load_config(DistillConfig, sys.argv[1]), progress=False)
"""


def test_sharded_processes_train_the_same_student(tiny_sd_v, tmp_path):
    (tmp_path / "prompts.txt").write_text("red cat\na dog\n")
    students = {}
    for name in ("whole", "sharded"):
        config = {
            "model": str(tiny_sd_v),
            "objective": {"gan_weight": 0.0, "critic_updates": 1, "guidance_scale": 2.0},
            "data": {"prompts": str(tmp_path / "prompts.txt")},
            "trainer": {
                "output_dir": str(tmp_path / name),
                "max_train_steps": 2,
                "train_batch_size": 1,
                "ema_decay": 0.5,
                "checkpointing_steps": 1,
                "validation_steps": 2,
            },
            "validation_prompts": ["red cat", "a dog"],
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        if name == "sharded":
            launched("fsdp2", "distill", tmp_path / f"{name}.yaml")
        else:
            launch(TRAINED, tmp_path / f"{name}.yaml", processes=2)
        assert (tmp_path / name / "samples" / "0000002.png").is_file()
        assert json.loads((tmp_path / name / "student" / "unet" / "config.json").read_text())["_class_name"] == (
            "UNet2DConditionModel"
        )
        students[name] = load_file(tmp_path / name / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    assert students["whole"].keys() == students["sharded"].keys()
    for key, value in students["whole"].items():
        torch.testing.assert_close(students["sharded"][key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_evaluation_is_shared_and_written_once(tmp_path):
    asked = [{"text": f"a {ink} seven", "ink": ink} for ink in ("red", "green", "blue")]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    command = ["evaluate", "ink_one_step", "--prompts", tmp_path / "asked.jsonl", "--out"]
    said = launched("ddp", *command, tmp_path / "two.json")
    with pytest.raises(SystemExit) as stop:
        run(list(map(str, [*command, tmp_path / "one.json"])))
    assert stop.value.code == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["agreement"] == two["agreement"] and one["agreement"]["ink"]
    assert said.count("rejected") == 1


def test_a_model_is_compared_with_pictures_by_all_processes_together(tmp_path):
    pictures, encoder = image_folder(tmp_path / "pictures", 21), vision.clip(tmp_path / "clip")
    lines = [{"file_name": f"{i}.png", "text": f"a {('red', 'green', 'blue')[i % 3]} seven"} for i in range(21)]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["evaluate", "ink_one_step", "--reference", pictures, "--encoder", encoder, "--out"]
    said = launched("ddp", *command, tmp_path / "two.json")
    with pytest.raises(SystemExit) as stop:
        run(list(map(str, [*command, tmp_path / "one.json"])))
    assert stop.value.code == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["fidelity"]["fid"] == pytest.approx(one["fidelity"]["fid"], rel=1e-3)
    assert two["similarity"] == pytest.approx(one["similarity"], rel=1e-4) and one["fidelity"]["n"] == 21
    assert said.count("similarity to captions") == 1


DRAWN = """
import sys
from accelerate import Accelerator
Accelerator()
import torch
from sublimate.evaluation import drawing
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model

model, drawn = open_model(sys.argv[1]), []
drawing.generate = lambda model, texts, **options: drawn.append(len(texts)) or generate(model, texts, **options)
for texts in (["red cat", "a dog", "cat", "dog", "red"], ["a dog"]):
    together = drawing.drawing(model, steps=2)(texts, 3)
    assert drawn.pop() == (len(texts) + 1) // 2
    torch.testing.assert_close(together, generate(model, texts, steps=2, seed=3), rtol=0, atol=1e-5)
"""


def test_processes_draw_their_shares_of_the_same_images(tiny_sd_v):
    launch(DRAWN, tiny_sd_v, processes=2)
