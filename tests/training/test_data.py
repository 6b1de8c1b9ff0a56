"""Sources draw what their random numbers say, and damaged data is named."""

import pytest
import torch
from captioned_sets import caption, image_folder
from pydantic import ValidationError

from sublimate.pipelines.model import open_model
from sublimate.training.data import ModelSource, read_prompts
from sublimate.training.data_config import DataConfig
from sublimate.training.randomness import SampleRandom
from sublimate.training.sources import framing_of, make_source


def test_prompts_come_from_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog \n")
    (tmp_path / "b.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog"}\n')
    assert read_prompts(tmp_path / "a.txt") == read_prompts(tmp_path / "b.jsonl") == ["a cat", "a dog"]


def test_a_prompt_may_hold_what_unicode_calls_an_end_of_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a café\u2028at night"}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "a.jsonl") == ["a café\u2028at night"]


def test_bad_prompt_files_are_named(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"caption": "a cat"}\n')
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="empty"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match='"text" field'):
        read_prompts(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"text": "a cat"}\n{"text": null}\n')
    with pytest.raises(ValueError, match="must be a text, and None is none"):
        read_prompts(tmp_path / "bad.jsonl")


def test_a_source_pairs_latents_with_prompts(tiny_sd):
    model = open_model(str(tiny_sd))
    prompts = ["red cat", "a dog", "cat"]
    latents = torch.arange(3.0).view(3, 1, 1, 1).expand(3, *model.latent_shape)
    source = ModelSource(model, prompts, latents)
    batch = source.batch(SampleRandom(0, 0, "x", range(8)))
    drawn = batch["images"][:, 0, 0, 0].long().tolist()
    assert len(set(drawn)) > 1
    torch.testing.assert_close(batch.condition["text"], model.encode_prompts([prompts[i] for i in drawn])["text"])
    with pytest.raises(ValueError, match="3 prompts do not match 2 images"):
        ModelSource(model, prompts, latents[:2])


def test_the_teachers_own_samples_are_the_real_class(tiny_sd, tmp_path):
    (tmp_path / "p.txt").write_text("red cat\na dog\n")
    model = open_model(str(tiny_sd))
    data = DataConfig(prompts=str(tmp_path / "p.txt"), images="teacher", teacher_steps=1)
    source = make_source(model, data, guidance_scale=2.0, progress=False)
    assert source.provides == {"prompts", "images"}
    assert source.tensors["images"].shape == (2, *model.latent_shape)
    assert make_source(model, data, 2.0, needs=frozenset({"prompts"}), progress=False).provides == {"prompts"}


def test_guidance_of_samples_that_no_teacher_draws_is_refused(tiny_sd):
    data = DataConfig(images=None, teacher_guidance_scale=2.0)
    with pytest.raises(ValueError, match="teacher_guidance_scale is of the teacher's own samples, and it draws none"):
        make_source(open_model(tiny_sd), data, 1.0, needs=frozenset({"prompts"}), progress=False)


def test_a_teacher_draws_no_more_than_it_is_asked_to(tiny_sd, tmp_path):
    prompts = [f"a {'red ' * i}cat" for i in range(9)]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    model = open_model(tiny_sd)
    data = DataConfig(prompts=str(tmp_path / "p.txt"), teacher_steps=1, count=3)
    source = make_source(model, data, 1.0, progress=False)
    assert len(source.prompts) == len(source.tensors["images"]) == 3
    assert source.prompts == [prompt for prompt in prompts if prompt in source.prompts] != prompts[:3]
    samples = make_source(model, data, 1.0, needs=frozenset({"prompts", "samples"}), progress=False)
    assert samples.prompts == source.prompts and len(samples.tensors["samples"]) == 3
    assert make_source(model, data, 1.0, needs=frozenset({"prompts"})).prompts == prompts


@pytest.mark.parametrize("need", ["prompts", "negatives"])
def test_what_the_data_lack_is_said_before_the_teacher_draws(tiny_sd, need):
    data = DataConfig(prompts=None, images="teacher", teacher_steps=1, count=8)
    with pytest.raises(ValueError, match=f"needs {need}, and the data have none: set data.{need}"):
        make_source(open_model(tiny_sd), data, 1.0, needs=frozenset({"images", need}), progress=False)


def test_a_model_that_is_told_of_crops_is_shown_none(tiny_sdxl, tmp_path):
    model, folder = open_model(tiny_sdxl), image_folder(tmp_path, 2)
    with pytest.raises(ValueError, match=r"not cropped at the side: set data\.center_crop to true"):
        make_source(model, DataConfig(train_data_dir=folder), 1.0)
    assert make_source(model, DataConfig(train_data_dir=folder, center_crop=True), 1.0).provides >= {"images"}
    assert make_source(model, DataConfig(train_data_dir=folder), 1.0, needs=frozenset({"prompts"})).provides


def test_captioned_pictures_come_without_prompts_and_images():
    data = DataConfig(train_data_dir="pictures")
    assert (data.prompts, data.images) == (None, None) and data.captioned
    assert DataConfig.model_validate(data.model_dump()) == data
    assert DataConfig(dataset_name="owner/name", images="teacher").images == "teacher"
    assert (DataConfig().prompts, DataConfig().images) == ("ink", "teacher")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_data_dir": "a", "dataset_name": "b"}, "both name the data"),
        ({"dataset_config_name": "b"}, "a configuration of dataset_name"),
        ({"train_data_dir": "a", "prompts": "p.txt"}, "own captions: set data.prompts to null"),
        ({"train_data_dir": "a", "images": "ink"}, "cannot be joined with images of 'ink'"),
        ({"images": "some/folder"}, "a folder of pictures is data.train_data_dir"),
        ({"prompts": "p.txt", "random_flip": True}, "random_flip is of captioned pictures, and none are read"),
        ({"caption_column": None}, "caption_column is of captioned pictures"),
        ({"train_data_dir": "a", "images": "teacher", "resolution": 8}, "resolution is of captioned pictures"),
        ({"train_data_dir": "a", "shuffle_buffer_size": 8}, "shuffle_buffer_size is of a stream"),
        ({"streaming": True}, "streaming is for dataset_name and train_data_dir"),
        ({"streaming": True, "dataset_name": "b", "images": "teacher"}, "a stream has no end"),
        ({"streaming": True, "dataset_name": "b", "cache_dir": "c"}, "a stream has no end: leave out one"),
    ],
)
def test_data_that_do_not_fit_each_other_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**options)


def test_where_results_are_kept_and_what_would_end_a_run_do_not_make_another_run():
    plain, cached = DataConfig(), DataConfig(cache_dir="somewhere", cache_shard_bytes=1, truncate_prompts=True)
    assert plain.lasting() == cached.lasting() != DataConfig(seed=1).lasting()


def test_a_folder_of_pictures_is_a_source(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    data = DataConfig(train_data_dir=image_folder(tmp_path, 6), random_flip=True)
    source = make_source(model, data, 1.0)
    assert source.provides == {"prompts", "images"} and len(source.prompts) == 12
    batch = source.batch(SampleRandom(0, 0, "x", range(8)))
    indices = SampleRandom(0, 0, "x", range(8)).integers(12)
    expected = model.encode_prompts([caption(i // 2) for i in indices.tolist()])["text"]
    torch.testing.assert_close(batch.condition["text"], expected)
    images = (indices // 2 * 3 / 255).float().view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(batch["images"], model.encode(images))
    assert make_source(model, data, 1.0, needs=frozenset({"prompts"})).provides == {"prompts"}


def test_captions_of_a_folder_may_serve_the_teacher(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    data = DataConfig(train_data_dir=image_folder(tmp_path, 2), images="teacher", teacher_steps=1)
    source = make_source(model, data, 1.0, progress=False)
    assert source.prompts == [caption(0), caption(1)] and source.tensors["images"].shape == (2, *model.latent_shape)


@pytest.mark.slow
def test_images_have_the_models_own_size(tiny_sd, tiny_dit, tiny_unconditional, tiny_audio):
    model = open_model(tiny_sd)
    for resolution in (None, 16):
        framing = framing_of(model, DataConfig(train_data_dir="a", resolution=resolution, center_crop=True, seed=3))
        assert (framing.height, framing.width, framing.center_crop, framing.seed) == (16, 16, True, 3)
    with pytest.raises(ValueError, match=r"32x32 pixels are latents of \(4, 16, 16\), and .* draws \(4, 8, 8\)"):
        framing_of(model, DataConfig(train_data_dir="a", resolution=32))
    dit = open_model(tiny_dit)
    framing = framing_of(dit, DataConfig(train_data_dir="a"))
    assert dit.encode(torch.zeros(1, 3, framing.height, framing.width)).shape[1:] == dit.latent_shape
    framing = framing_of(open_model(tiny_unconditional), DataConfig(train_data_dir="a"))
    assert (framing.height, framing.width) == (8, 8)
    with pytest.raises(ValueError, match="makes no images"):
        framing_of(open_model(tiny_audio), DataConfig(train_data_dir="a"))


def test_folders_that_cannot_be_streamed_are_refused(tiny_sd, tmp_path):
    model = open_model(tiny_sd)
    data = DataConfig(train_data_dir=image_folder(tmp_path, 2), streaming=True)
    with pytest.raises(ValueError, match=r"read by row as it is: set data\.streaming to false"):
        make_source(model, data, 1.0)
    with pytest.raises(ValueError, match="needs a sample of every prompt"):
        make_source(model, data, 1.0, needs=frozenset({"images", "samples"}))
