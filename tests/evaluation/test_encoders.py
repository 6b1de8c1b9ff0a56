"""Image encoders: whose features are taken, and how well CLIP finds that images fit texts."""

import pytest
import torch
import vision
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPModel, CLIPTokenizer, ViTForImageClassification

from sublimate.evaluation.encoders import ImageEncoder, ImageTextEncoder, open_encoder
from sublimate.evaluation.fidelity import extract
from sublimate.pipelines.preprocessing import Preprocessing

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXTS = ["a cat", "a red dog", "cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("encoders")


@torch.no_grad()
def test_a_networks_own_summary_is_taken(folder):
    encoder = open_encoder(str(vision.dinov2(folder / "dinov2")))
    seen = AutoModel.from_pretrained(folder / "dinov2")(pixel_values=encoder.preprocessing(IMAGES))
    assert torch.equal(encoder.features(IMAGES), seen.last_hidden_state[:, 0])  # DINOv2's class token, normalised
    assert not any(p.requires_grad for p in encoder.parameters())


@torch.no_grad()
def test_a_pooler_that_no_checkpoint_holds_is_not_read(folder):
    encoder = open_encoder(str(vision.vit(folder / "vit")))
    body = ViTForImageClassification.from_pretrained(folder / "vit").vit
    hidden = body(pixel_values=encoder.preprocessing(IMAGES)).last_hidden_state
    torch.testing.assert_close(encoder.features(IMAGES), hidden.mean(dim=1))


@torch.no_grad()
def test_similarity_is_clips_logit_without_its_scale(folder):
    encoder = open_encoder(str(vision.clip(folder / "clip")))
    model = CLIPModel.from_pretrained(folder / "clip")
    tokens = encoder.tokenizer(TEXTS, padding=True, return_tensors="pt")
    theirs = model(**tokens, pixel_values=encoder.preprocessing(IMAGES)).logits_per_image.diag()
    ours = encoder.similarity(extract(encoder.features, IMAGES), TEXTS)
    torch.testing.assert_close(ours.float(), theirs / model.logit_scale.exp(), atol=1e-6, rtol=1e-5)
    assert not encoder.cut
    long = encoder.similarity(extract(encoder.features, IMAGES[:1]), ["cat " * 20])
    assert torch.equal(long, encoder.similarity(extract(encoder.features, IMAGES[:1]), ["cat " * 30])) and encoder.cut


@torch.no_grad()
def test_a_convolutional_networks_summary_is_one_vector(folder):
    encoder = open_encoder(str(vision.convnext(folder / "convnext")))
    assert extract(encoder.features, IMAGES.repeat(1, 1, 2, 2)).shape == (3, 6)
    whole = ImageEncoder(encoder.model, encoder.preprocessing, pooled=False)
    assert extract(whole.features, IMAGES.repeat(1, 1, 2, 2)).shape == (3, 6)


@torch.no_grad()
def test_siglip_reads_its_padding(folder):
    tokenizer = CLIPTokenizer.from_pretrained(vision.clip(folder / "words"))
    tokenizer.padding_side = "left"
    model = vision.siglip()
    encoder = ImageTextEncoder(model, tokenizer, Preprocessing(None))
    ids = torch.full((3, 24), tokenizer.pad_token_id)
    for row, text in zip(ids, TEXTS, strict=True):
        words = torch.tensor(tokenizer(text)["input_ids"])
        row[: len(words)] = words
    theirs = (model(input_ids=ids, pixel_values=IMAGES).logits_per_image - model.logit_bias) / model.logit_scale.exp()
    ours = encoder.similarity(extract(encoder.features, IMAGES), TEXTS)
    torch.testing.assert_close(ours.float(), theirs.diag(), atol=1e-6, rtol=1e-5)


def test_what_is_no_encoder_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="is no image encoder with an image processor"):
        open_encoder(str(tmp_path))
    file = vision.dinov2(folder / "broken") / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.0.mlp.fc1.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of its encoder, encoder\.layer\.0\.mlp\.fc1\.weight among"):
        open_encoder(str(folder / "broken"))
