"""What encoders make of the data: the same bits from memory and disk, and never another model's or data's."""

import copy
import json

import pytest
import torch
from captioned_sets import caption, image_folder
from PIL import Image

from sublimate.pipelines.model import open_model
from sublimate.training.captioned import Framing, ImageFolder, Images
from sublimate.training.encoding import Cache, Latents, Prompts, Remembered, encoders_hash

TEXTS = ["red cat", "a dog", "cat", "a dog"]


@pytest.fixture
def model(tiny_sd):
    return open_model(tiny_sd)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 3000, progress=False)


def images(folder, count=5, **framing):
    return Images(ImageFolder(image_folder(folder, count)), Framing(16, 16, **framing), mirrored=True)


def tables(cache):
    return sorted(path.name for path in cache.folder.iterdir())


def test_the_most_recent_are_remembered_up_to_a_limit():
    asked = []

    def compute(keys):
        asked.extend(keys)
        return ({"x": torch.full((4,), float(key))} for key in keys)

    memory = Remembered(compute, limit=3 * 16)
    assert memory.rows([1, 2, 3, 1])["x"][:, 0].tolist() == [1, 2, 3, 1] and asked == [1, 2, 3]
    memory.rows([4])  # 2 was not used for longest
    assert memory.held == 48 and memory.rows([1, 3, 4])["x"][:, 0].tolist() == [1, 3, 4] and asked == [1, 2, 3, 4]
    memory.rows([2])
    assert asked == [1, 2, 3, 4, 2]
    # What is asked for together is there, whether or not all of it can be kept.
    small = Remembered(compute, limit=1)
    assert small.rows([1, 2, 1])["x"][:, 0].tolist() == [1, 2, 1] and small.held == 16


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd3", "tiny_audio", "tiny_inpainting"])
def test_conditions_are_the_same_bits_from_memory_and_disk(request, cache, name):
    model = open_model(request.getfixturevalue(name))
    stored, remembered = Prompts(model, TEXTS, cache)(TEXTS), Prompts(model)(TEXTS)
    assert stored.keys() == remembered.keys() == model.encode_prompts(TEXTS).keys()
    for key, value in model.encode_prompts(TEXTS).items():
        assert torch.equal(stored[key], remembered[key])
        torch.testing.assert_close(stored[key], value, rtol=1e-5, atol=1e-5)


def test_prompts_are_encoded_as_if_nothing_else_were_going_on(model):
    alone = model.encode_prompts(TEXTS[:1])["text"]
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        among = Prompts(model)(TEXTS)
    assert torch.equal(among["text"][:1], alone) and not among["text"].requires_grad


def test_latents_are_the_same_bits_from_memory_and_disk(model, cache, tmp_path):
    wanted = torch.tensor([7, 0, 9, 3, 7])
    pictures = images(tmp_path / "data")
    stored, remembered = Latents(model, pictures, cache), Latents(model, pictures)
    assert len(stored) == len(remembered) == 10
    assert torch.equal(stored[wanted], remembered[wanted])
    with torch.no_grad():
        torch.testing.assert_close(stored[wanted], model.encode(pictures[wanted]), rtol=1e-4, atol=1e-4)


def test_what_is_stored_is_not_encoded_again(model, cache, tmp_path):
    pictures = images(tmp_path / "data")
    prompts, latents = Prompts(model, TEXTS, cache), Latents(model, pictures, cache)
    found = prompts(TEXTS), latents[torch.arange(10)]
    index = json.loads(next(cache.folder.glob("prompts-*/index.json")).read_text())
    assert sum(shard["rows"] for shard in index["shards"]) == 3  # different prompts
    before = tables(cache)
    for name in ("text_encoder", "vae"):
        model.component(name).register_forward_pre_hook(lambda *_: pytest.fail("encoded again"))
    assert torch.equal(Prompts(model, TEXTS, cache)(TEXTS)["text"], found[0]["text"])
    assert torch.equal(Latents(model, pictures, cache)[torch.arange(10)], found[1])
    assert tables(cache) == before


def changed_weight(model):
    with torch.no_grad():
        next(model.component("text_encoder").parameters()).flatten()[0] += 1e-3


def changed_scale(model):
    model.component("vae").register_to_config(scaling_factor=0.2)


def changed_precision(model):
    model.to(dtype=torch.bfloat16)


def longer_prompts(model):
    model.pipeline.tokenizer.model_max_length += 1


@pytest.mark.parametrize("change", [changed_weight, changed_scale, changed_precision, longer_prompts])
def test_another_encoder_does_not_find_these_tables(model, cache, tmp_path, change):
    model.to(dtype=torch.bfloat16).to(dtype=torch.float32)  # the same weights in either precision
    pictures = images(tmp_path / "data", 1)
    Prompts(model, TEXTS, cache), Latents(model, pictures, cache)
    change(model)
    if change is longer_prompts:
        cache_key = encoders_hash(model)
        model.pipeline.tokenizer.model_max_length -= 1
        assert encoders_hash(model) != cache_key
        return
    Prompts(model, TEXTS, cache), Latents(model, pictures, cache)
    assert len(tables(cache)) == 4


def test_other_data_do_not_find_these_tables(model, cache, tmp_path):
    Prompts(model, TEXTS, cache), Latents(model, images(tmp_path / "data"), cache)
    Prompts(model, TEXTS[::-1], cache), Latents(model, images(tmp_path / "data", center_crop=True), cache)
    Image.new("RGB", (17, 16)).save(tmp_path / "data" / "0.png")
    pictures = Images(ImageFolder(tmp_path / "data"), Framing(16, 16), mirrored=True)
    Latents(model, pictures, cache)
    assert [name.split("-")[0] for name in tables(cache)] == ["latents"] * 3 + ["prompts"] * 2


def test_only_what_encodes_counts(model, tiny_sd):
    before = encoders_hash(model)
    model.encode_prompts(["red cat"])  # leaves padding behind in the tokenizer
    with torch.no_grad():
        next(model.denoiser.parameters()).add_(1)
    assert encoders_hash(model) == before == encoders_hash(open_model(tiny_sd))
    twin = copy.deepcopy(model.component("vae"))
    assert twin is not model.component("vae")


def test_captions_of_the_tests_differ():
    assert len({caption(i) for i in range(64)}) == 64


LONG = ["red cat", *(f"{'a ' * count}dog" for count in (20, 30, 40))]


def test_long_prompts_are_refused_or_cut_and_counted(model, cache, caplog):
    with pytest.raises(ValueError, match="23 tokens"):
        Prompts(model)(LONG[:2])
    for where in (None, cache):
        caplog.clear()
        prompts = Prompts(model, LONG, where, truncate=True)
        found = prompts([*LONG, LONG[1]])["text"]
        # 16 tokens, of which the first and the last are no words.
        assert torch.equal(found[1], model.encode_prompts(["a " * 14])["text"][0]) and torch.equal(found[1], found[3])
        assert torch.equal(found[0], model.encode_prompts(LONG[:1])["text"][0])
        said = [record.message for record in caplog.records]
        assert [message.split(" of ")[0] for message in said] == ["1", "2"]
        assert said[0].endswith("was longer than the text encoder reads and cut to fit.")
    with pytest.raises(ValueError, match="23 tokens"):
        model.encode_prompts(LONG[1:2])
    with pytest.raises(ValueError, match="23 tokens"):
        Prompts(model, LONG, cache)


def test_encoders_that_leave_float16_are_one_sentence(model, tmp_path):
    model.to(dtype=torch.float16)
    with torch.no_grad():
        model.pipeline.vae.encoder.conv_in.weight.mul_(1e4)
        model.pipeline.vae.encoder.conv_in.bias.fill_(6e4)
        model.pipeline.text_encoder.get_submodule("embeddings.position_embedding").weight.fill_(torch.inf)
    latents = Latents(model, images(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"The encoded pictures of .* overflow float16 .*: open it in bfloat16"):
        latents[torch.tensor([1])]
    with pytest.raises(ValueError, match=r"The text encoder's states of .* overflow float16"):
        Prompts(model)(TEXTS[:1])
