"""Ink's training from end to end, two steps per stage: what it writes opens, and runs again without training."""

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline

from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.training.config import load_config
from sublimate.training.ink.detector import InkDetector
from sublimate.training.ink.sources import CaptionedLatents, Pictures, captioned
from sublimate.training.ink.train import InkConfig, train_ink
from sublimate.training.ink.world import sample
from sublimate.training.objectives.denoising import DenoisingConfig
from sublimate.training.randomness import SampleRandom

QUICK = tuple(
    f"{stage}.trainer.{option}"
    for stage in ("autoencoder", "detector", "teacher")
    for option in ("max_train_steps=2", "train_batch_size=3", "checkpointing_steps=1", "lr_warmup_steps=0")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ink")
    config = load_config(InkConfig, "ink", [f"output_dir={path}", "teacher.pictures=6", *QUICK], kind="teacher")
    return train_ink(config, progress=False), config


@pytest.mark.slow
def test_the_teacher_is_a_stock_pipeline_that_our_loader_agrees_with(folder):
    path, _ = folder
    stock = DiffusionPipeline.from_pretrained(path / "teacher", dtype=torch.float32)
    assert type(stock).__name__ == "StableDiffusionPipeline"
    model = open_model(str(path / "teacher"))
    assert model.guidance_scale == 3.0 and model.defaults["steps"] == 25
    assert generate(model, ["a red seven"], steps=1).shape == (1, 3, 32, 32)
    assert (
        model.null_condition()["text"].shape == stock.text_encoder(torch.zeros(1, 32).long()).last_hidden_state.shape
    )


def test_the_detector_opens(folder):
    path, _ = folder
    found = InkDetector.load(path / "detector.safetensors")(torch.zeros(2, 3, 32, 32))
    assert {name: p.shape for name, p in found.items()} == {"digit": (2, 11), "ink": (2, 7), "style": (2, 5)}


@pytest.mark.slow
def test_a_finished_run_trains_nothing_again(folder):
    path, config = folder
    before = (path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    logs = {p: p.read_bytes() for p in path.rglob("log.jsonl")}
    train_ink(config, progress=False)
    assert (path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert {p: p.read_bytes() for p in path.rglob("log.jsonl")} == logs and len(logs) == 3


@pytest.mark.slow
def test_another_recipe_does_not_resume_from_this_ones_checkpoints(folder):
    path, config = folder
    before = (path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    changes = {"objective": config.teacher.objective.model_copy(update={"condition_dropout": 0.2})}, {"pictures": 7}
    for change in changes:
        other = config.model_copy(update={"teacher": config.teacher.model_copy(update=change)})
        with pytest.raises(ValueError, match="another model, data or options"):
            train_ink(other, progress=False)
    faster = DenoisingConfig(condition_dropout=0.1, student={"learning_rate": 1e-5, "adam_weight_decay": 0.0})
    train_ink(
        config.model_copy(update={"teacher": config.teacher.model_copy(update={"objective": faster})}), progress=False
    )
    assert (path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_another_autoencoder_makes_another_teacher(folder, tmp_path):
    path, config = folder
    shutil.copytree(path, tmp_path / "ink")
    shutil.rmtree(tmp_path / "ink" / "stages" / "autoencoder")
    other = config.autoencoder.objective.model_copy(update={"edge_weight": 0.1})
    changes = {
        "output_dir": tmp_path / "ink",
        "autoencoder": config.autoencoder.model_copy(update={"objective": other}),
    }
    with pytest.raises(ValueError, match="another model, data or options"):
        train_ink(config.model_copy(update=changes), progress=False)


@pytest.mark.parametrize("option", ["detector.trainer.seed=1", "teacher.trainer.output_dir=elsewhere"])
def test_stages_have_no_folder_or_seed_of_their_own(option):
    with pytest.raises(ValueError, match="share one folder and seed"):
        load_config(InkConfig, "ink", [option], kind="teacher")


def test_sources_depend_on_their_random_numbers_alone():
    random = [SampleRandom(0, 0, "x", range(3)) for _ in range(2)]
    assert torch.equal(Pictures().batch(random[0])["images"], Pictures().batch(random[1])["images"])
    _, glyphs = sample(range(4))
    said = []

    def note(texts):
        said.append(texts)
        return {}

    for _ in range(2):
        CaptionedLatents(torch.zeros(4, 4, 8, 8), glyphs, note).batch(SampleRandom(0, 1, "x", range(5)))
    assert said[0] == said[1] and len(said[0]) == 5


def test_captions_come_with_their_pictures():
    texts, images = captioned(5, 3, render=True)
    again, none = captioned(5, 3, render=False)
    assert texts == again and none is None
    assert torch.equal(images, sample(range(5), "train", 3)[0])
    assert captioned(5, 4, render=False)[0] != texts
