"""Training data of models that see pictures: masks and small images, drawn per sample from the images."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from sublimate.pipelines.backbones.inpainting import rectangles
from sublimate.pipelines.model import open_model
from sublimate.training.data import ModelSource
from sublimate.training.distill import DataConfig, DistillConfig, distill, make_source
from sublimate.training.randomness import SampleRandom

PROMPTS = ["red cat", "a dog", "cat"]


def random(size=8):
    return SampleRandom(0, 0, "x", range(size))


def source_of(model, pictures=True):
    images = torch.rand((3, 3, 16, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        latents = model.encode(images)
    return ModelSource(model, PROMPTS, latents, pictures=images if pictures else None), images, latents


def test_masks_are_rectangles_or_everything():
    masks = rectangles(random(2000), 16, 32)
    assert masks.shape == (2000, 1, 16, 32)
    rows, columns = masks.amax((1, 3)), masks.amax((1, 2))
    assert torch.equal(masks[:, 0], rows[:, :, None] * columns[:, None, :])
    for side, size in ((rows, 16), (columns, 32)):
        ends = torch.diff(side, dim=1, prepend=torch.zeros(2000, 1), append=torch.zeros(2000, 1)).abs().sum(1)
        assert bool((ends == 2).all())
        assert side.sum(1).min() == size // 4 + 1 and side.sum(1).max() == size
        # No place is left out, and neither end is preferred.
        often = side.mean(0)
        assert often.min() > 0.3 and (often - often.flip(0)).abs().max() < 0.05
    # Everything in a quarter, and where both sides happen to be whole.
    assert masks.mean((1, 2, 3)).eq(1).float().mean() == pytest.approx(0.25, abs=0.04)
    assert torch.equal(masks[5:9], rectangles(SampleRandom(0, 0, "x", range(5, 9)), 16, 32))


@pytest.mark.slow
@torch.no_grad()
def test_a_source_shows_masked_images(tiny_inpainting):
    model = open_model(tiny_inpainting)
    source, images, latents = source_of(model)
    assert source.provides == {"prompts", "images", "masks"}
    batch, again = source.batch(random()), random()
    indices = again.integers(3)
    shown = model.show(images=images[indices], masks=rectangles(again, 16, 16))
    assert torch.equal(batch["images"], latents[indices])
    for key in ("extra.mask", "extra.masked"):
        torch.testing.assert_close(batch.condition[key], shown[key], atol=1e-6, rtol=0)
    assert len(batch.condition["extra.mask"].flatten(1).unique(dim=0)) > 3


@pytest.mark.slow
@torch.no_grad()
def test_a_source_shows_small_images(tiny_upscaling):
    model = open_model(tiny_upscaling)
    source, images, _ = source_of(model)
    assert source.provides == {"prompts", "images", "low_res"}
    batch, again = source.batch(random()), random()
    small = F.avg_pool2d(images, 2)[again.integers(3)]
    shown = model.show(low_res=small, noise=again.normal((3, 8, 8)), noise_level=again.integers(36))
    torch.testing.assert_close(batch.condition.extra, shown)
    assert len(shown["extra.noise_level"].unique()) > 4


@pytest.mark.slow
@torch.no_grad()
def test_pictures_are_decoded_latents_unless_given(tiny_inpainting):
    model = open_model(tiny_inpainting)
    source, _, latents = source_of(model, pictures=False)
    given = ModelSource(model, PROMPTS, latents, pictures=model.render(latents))
    a, b = source.batch(random()).condition, given.batch(random()).condition
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_data_that_cannot_be_shown_are_refused(tiny_sd, tiny_inpainting, tiny_upscaling, tmp_path):
    (tmp_path / "p.txt").write_text("red cat\na dog\n")
    prompts = {"prompts": str(tmp_path / "p.txt")}
    with pytest.raises(ValueError, match="is shown masks, which are made from images"):
        ModelSource(open_model(tiny_inpainting), PROMPTS)
    with pytest.raises(ValueError, match="for models that are shown some"):
        ModelSource(open_model(tiny_sd), PROMPTS, torch.zeros(3, 4, 8, 8), pictures=torch.zeros(3, 3, 16, 16))
    with pytest.raises(ValueError, match="has none of its own"):
        make_source(open_model(tiny_upscaling), DataConfig(**prompts), 1.0)
    with pytest.raises(ValueError, match="choose another method"):
        make_source(open_model(tiny_inpainting), DataConfig(**prompts), 1.0, needs=frozenset({"images", "samples"}))
    # An inpainting teacher draws from prompts alone.
    data = DataConfig(**prompts, teacher_steps=1)
    assert make_source(open_model(tiny_inpainting), data, 1.0, progress=False).provides >= {"images", "masks"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_inpainting", "tiny_upscaling"])
def test_flash_distils_them_to_stock_pipelines(request, name, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, prompt in enumerate(PROMPTS):
        Image.new("RGB", (16, 16), (40 * i, 90, 200)).save(folder / f"{i}.png")
        with (folder / "metadata.jsonl").open("a") as file:
            file.write(f'{{"file_name": "{i}.png", "text": "{prompt}"}}\n')
    objective = {"teacher_steps": 2, "guidance_range": [2.0, 3.0], "dmd_weights": [0.5], "adversarial_weights": [0.1]}
    config = DistillConfig(
        model=str(request.getfixturevalue(name)),
        method="flash",
        objective={**objective, "student": {"kind": "full"}},
        data={"train_data_dir": folder},
        trainer={"output_dir": tmp_path / "run", "max_train_steps": 2, "train_batch_size": 2, "validation_steps": 1},
        validation_prompts=("a cat", "a dog"),
    )
    student = open_model(distill(config, progress=False))
    assert type(student.pipeline).__name__ == type(open_model(config.model).pipeline).__name__
    assert student.defaults["few_steps"]["sampler"] == "consistency"
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2
