"""Sources draw what their random numbers say, and damaged data is named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sublimate.pipelines.model import open_model
from sublimate.training.data import ModelSource, read_image_folder, read_prompts
from sublimate.training.distill import DataConfig, make_source
from sublimate.training.randomness import SampleRandom


def test_prompts_come_from_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog \n")
    (tmp_path / "b.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog"}\n')
    assert read_prompts(tmp_path / "a.txt") == read_prompts(tmp_path / "b.jsonl") == ["a cat", "a dog"]


def test_bad_prompt_files_are_named(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"caption": "a cat"}\n')
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="empty"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match='"text" field'):
        read_prompts(tmp_path / "bad.jsonl")


def write_picture(path, size=(4, 4), value=128):
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)


def test_an_image_folder_gives_captions_and_pixels(tmp_path):
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(2)]
    for i in range(2):
        write_picture(tmp_path / f"{i}.png", value=51 * i)
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    captions, images = read_image_folder(tmp_path)
    assert captions == ["picture 0", "picture 1"]
    torch.testing.assert_close(images.mean((1, 2, 3)), torch.tensor([0.0, 0.2]))


def test_damaged_image_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        read_image_folder(tmp_path)
    write_picture(tmp_path / "0.png")
    write_picture(tmp_path / "1.png", size=(8, 8))
    lines = ['{"file_name": "0.png", "text": "x"}', '{"file_name": "1.png", "text": "y"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="one size"):
        read_image_folder(tmp_path)
    (tmp_path / "1.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be used"):
        read_image_folder(tmp_path)


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
    with pytest.raises(ValueError, match="own captions"):
        make_source(model, DataConfig(prompts=str(tmp_path / "p.txt"), images=str(tmp_path)), 1.0)
    with pytest.raises(ValueError, match="own captions"):
        make_source(model, DataConfig(images=str(tmp_path)), 1.0)
    assert make_source(model, data, 2.0, needs=frozenset({"prompts"}), progress=False).provides == {"prompts"}
