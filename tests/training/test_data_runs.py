"""Runs on full-size data: caches, restarts and processes change no bit of what is trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from captioned_sets import LAYOUTS, caption, image_folder
from PIL import Image
from processes import launch
from safetensors.torch import load_file

from sublimate.pipelines.model import open_model
from sublimate.training import checkpoints, sources
from sublimate.training.data_config import DataConfig
from sublimate.training.distill import DistillConfig, distill
from sublimate.training.objectives.denoising import Denoising, DenoisingConfig
from sublimate.training.sources import make_source
from sublimate.training.trainer import Trainer, TrainerConfig

STREAMED = ("parquet", "tar")


def trained(model, data, folder, steps=4, processes=1, **trainer):
    """Trains on tiny data, and reads back what a checkpoint holds of the student."""
    model = open_model(model)
    torch.manual_seed(0)
    # With so large an epsilon Adam does not make much of the rounding of gradients that are almost 0.
    objective = Denoising(model, DenoisingConfig(student={"learning_rate": 0.1, "adam_epsilon": 1.0}))
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "checkpointing_steps": 2, **trainer}
    config = TrainerConfig(output_dir=folder, max_train_steps=steps, **options)
    shuffled = {"shuffle_buffer_size": 9} if data.get("streaming") else {}
    data = DataConfig(**{**shuffled, "teacher_steps": 1, **data})
    size = config.local_batch * processes
    source = make_source(model, data, 1.0, needs=objective.needs, global_batch=size, progress=False)
    Trainer(objective, source, config, progress=False).run()
    return student_of(folder, steps)


def student_of(folder, steps=4):
    path = folder / f"{checkpoints.PREFIX}{steps}" / "player.student.safetensors"
    return load_file(path) if path.is_file() else {}


def assert_same(first, second, **tolerance):
    assert first and first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def written(layout, folder):
    """The options of a layout's data, written to a folder."""
    folder.mkdir(exist_ok=True)
    if layout == "prompts":
        (folder / "prompts.txt").write_text("\n".join(caption(i) for i in range(5)))
        return {"prompts": str(folder / "prompts.txt")}
    if layout != "folder":
        pytest.importorskip("datasets")
    write, columns = LAYOUTS[layout]
    return {"train_data_dir": write(folder / "data", 12), "random_flip": True, **columns}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["prompts", "folder", "parquet", "tar"])
def test_caches_and_restarts_change_no_bit(tiny_sd, tmp_path, layout):
    data, cache = written(layout, tmp_path), {"cache_dir": tmp_path / "cache", "cache_shard_bytes": 5000}
    plain = trained(tiny_sd, data, tmp_path / "plain")
    assert_same(trained(tiny_sd, {**data, **cache}, tmp_path / "cached"), plain)
    # What was begun without a cache goes on with one, and the other way round.
    for first, then in (({}, cache), (cache, {})):
        folder = tmp_path / "stopped"
        trained(tiny_sd, {**data, **first}, folder, steps=2)
        assert_same(trained(tiny_sd, {**data, **then}, folder), plain)
        shutil.rmtree(folder)
    split = {"train_batch_size": 1, "gradient_accumulation_steps": 4}
    parts = trained(tiny_sd, data, tmp_path / "parts", **split)
    assert_same(trained(tiny_sd, {**data, **cache}, tmp_path / "cached parts", **split), parts)
    assert_same(parts, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", STREAMED)
def test_a_stopped_stream_goes_on_as_if_it_had_not_been(tiny_sd, tmp_path, layout):
    data = {**written(layout, tmp_path), "streaming": True}
    plain = trained(tiny_sd, data, tmp_path / "plain", steps=5)
    # Two steps of four from lanes of three rows each: in the middle of a pass.
    trained(tiny_sd, data, tmp_path / "stopped", steps=2)
    assert_same(trained(tiny_sd, data, tmp_path / "stopped", steps=5), plain)
    shutil.rmtree(tmp_path / "stopped")
    trained(tiny_sd, data, tmp_path / "stopped", steps=2)
    forgotten = trained(tiny_sd, {**data, "seed": 1}, tmp_path / "stopped", steps=5)
    assert any(not torch.equal(forgotten[name], plain[name]) for name in plain)


WORKER = """
import json, runpy, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
kit = runpy.run_path(sys.argv[1])
for data, folder in json.loads(sys.argv[4]):
    kit["trained"](sys.argv[3], data, Path(folder), processes=2, gradient_accumulation_steps=1)
"""


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tiny_sd, tmp_path):
    """One of them writes the cache, and both go on from what they wrote as one does."""
    pytest.importorskip("datasets")
    stored, streamed = ({**written(layout, tmp_path / layout)} for layout in ("folder", "parquet"))
    runs = {"cached": {**stored, "cache_dir": tmp_path / "cache", "cache_shard_bytes": 4000}}
    runs |= {"streamed": {**streamed, "streaming": True}}
    plain = {"cached": stored, "streamed": runs["streamed"]}
    tasks = json.dumps([(data, tmp_path / "two" / name) for name, data in runs.items()], default=str)
    launch(WORKER, __file__, Path(__file__).parents[1] / "support", tiny_sd, tasks, processes=2, timeout=300)
    for name, data in runs.items():
        alone = trained(tiny_sd, plain[name], tmp_path / "one" / name, gradient_accumulation_steps=2)
        assert_same(student_of(tmp_path / "two" / name), alone, rtol=1e-4, atol=1e-6)
        shutil.rmtree(tmp_path / "two" / name / "checkpoint-4")
        assert_same(trained(tiny_sd, data, tmp_path / "two" / name), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_sd", "tiny_inpainting"])
def test_a_distillation_without_its_encoders_validates_and_exports(request, tmp_path, name):
    data = {**written("folder", tmp_path), "random_flip": False}
    model = request.getfixturevalue(name)
    objective = {"teacher_steps": 2, "guidance_range": [2.0, 3.0], "dmd_weights": [0.5], "adversarial_weights": [0.1]}

    def student(out, **cache):
        config = DistillConfig(
            model=str(model),
            method="flash",
            objective={**objective, "student": {"kind": "full"}},
            data={**data, **cache},
            trainer={"output_dir": out, "max_train_steps": 2, "train_batch_size": 2, "validation_steps": 1},
            validation_prompts=("a cat", "a dog"),
        )
        return open_model(distill(config, progress=False))

    plain = student(tmp_path / "plain")
    cached = student(tmp_path / "cached", cache_dir=tmp_path / "cache", cache_shard_bytes=10000)
    assert plain.content_hash() == cached.content_hash()
    for step in (1, 2):
        first, second = (Image.open(tmp_path / run / "samples" / f"{step:07d}.png") for run in ("plain", "cached"))
        assert max(abs(a - b) for a, b in zip(first.tobytes(), second.tobytes(), strict=True)) <= 1
    kinds = {path.name.split("-")[0] for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    assert kinds == {"prompts", "latents", "encoders"}


@pytest.mark.slow
@pytest.mark.parametrize("images", [None, "teacher"])
def test_long_captions_end_a_run_or_are_cut(tiny_sd, tmp_path, images):
    data = {"train_data_dir": image_folder(tmp_path / "data", 2), "images": images}
    lines = [{"file_name": f"{i}.png", "text": "red " * 20 + "cat" * i} for i in range(2)]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="tokens but the model reads 16"):
        trained(tiny_sd, data, tmp_path / "refused", steps=2)
    cut = trained(tiny_sd, {**data, "truncate_prompts": True}, tmp_path / "cut", steps=2)
    lines = [{**line, "text": "red " * 14} for line in lines]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert_same(cut, trained(tiny_sd, data, tmp_path / "short", steps=2))


@pytest.mark.slow
def test_the_teachers_samples_are_drawn_once_for_all_that_they_depend_on(tiny_sd, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("red cat\na dog\n")
    drawings = []
    draw = sources.generate_latents
    monkeypatch.setattr(sources, "generate_latents", lambda *a, **k: drawings.append(1) or draw(*a, **k))

    def samples(model, scale=1.5, precision="no", **data):
        options = {"prompts": str(tmp_path / "prompts.txt"), "teacher_steps": 1, "cache_dir": tmp_path / "cache"}
        config = DataConfig(**options | data)
        return make_source(model, config, scale, mixed_precision=precision, progress=False).tensors["images"]

    model = open_model(tiny_sd)
    first = samples(model)
    assert torch.equal(samples(model), first) and torch.equal(samples(model, cache_dir=None), first)
    assert len(drawings) == 2  # the second without a cache
    guided = samples(model, scale=2.0)
    assert torch.equal(samples(model, teacher_guidance_scale=2.0), guided)
    others = [guided, samples(model, teacher_steps=2), samples(model, seed=1), samples(model, precision="bf16")]
    assert torch.cosine_similarity(others[-1].flatten(), first.flatten(), 0) > 0.999
    with torch.no_grad():
        model.pipeline.unet.conv_in.bias.add_(1)
    others.append(samples(model))
    assert len(drawings) == 7 and not any(torch.equal(x0, first) for x0 in others)
