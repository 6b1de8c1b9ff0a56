"""Detectors on tiny real classes: preprocessing equals the processor's, rejection obeys its threshold."""

from __future__ import annotations

import pytest
import torch
import vision
from transformers import (
    CLIPModel,
    CLIPTokenizer,
    ConvNextConfig,
    ConvNextForImageClassification,
    ViTForImageClassification,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.levit.image_processing_pil_levit import LevitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from sublimate.evaluation import detectors
from sublimate.evaluation.agreement import read
from sublimate.evaluation.detectors import ImageClassifier, open_detector, with_reject
from sublimate.evaluation.fidelity import extract
from sublimate.pipelines.detector import Detector
from sublimate.pipelines.preprocessing import Preprocessing
from sublimate.training.ink.detector import InkDetector
from sublimate.training.ink.vocabulary import GROUPS


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return vision.vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return vision.clip(tmp_path_factory.mktemp("clip"))


def images(n: int = 6, size: int = 24) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 12, "width": 20}),
        ViTImageProcessorPil(size={"height": 80, "width": 80}, do_normalize=False),
        ViTImageProcessorPil(size={"height": 16, "width": 16}, rescale_factor=1 / 127.5),
        ViTImageProcessorPil(do_resize=False, do_rescale=False, do_normalize=False),
        CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=16),
        ConvNextImageProcessorPil(size={"shortest_edge": 32}),
        ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    ],
)
def test_preprocessing_equals_the_processors(processor):
    made = Preprocessing.of(processor)
    picture = torch.randint(64, 192, (3, 40, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    theirs = processor(picture.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"].float()
    difference = (theirs - made(picture[None] / 255)).abs() * torch.tensor(made.std)[:, None, None] / made.scale
    assert difference.max() < 2 / 255 and difference.mean() < 0.4 / 255


def test_a_processor_that_does_more_is_refused():
    with pytest.raises(ValueError, match="LevitImageProcessorPil does more than resize"):
        Preprocessing.of(LevitImageProcessorPil())
    with pytest.raises(ValueError, match="not by height and width or one edge"):
        Preprocessing.of(ViTImageProcessorPil(size={"max_height": 9, "max_width": 9}))


def test_reject_wins_exactly_below_the_threshold():
    given = torch.tensor([[0.7, 0.3, 0.0], [0.59, 0.41, 0.0], [0.61, 0.39, 0.0]])
    found = with_reject(given, 0.6)
    assert torch.allclose(found.sum(dim=1), torch.ones(3))
    assert found.argmax(dim=1).tolist() == [0, 2, 0]
    assert torch.equal(with_reject(given, 0.0), given)


def test_a_classifier_is_a_detector(vit):
    detector = open_detector(str(vit))
    assert detector.groups == {"class": ("crane (0)", "dog", "crane (2)")}
    pixels = images().requires_grad_()
    found = detector(pixels)["class"]
    assert found.shape == (6, 4) and torch.allclose(found.sum(dim=1), torch.ones(6))
    plain = ViTForImageClassification.from_pretrained(vit).eval()
    logits = plain(pixel_values=Preprocessing((16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)(pixels)).logits
    assert torch.allclose(found[:, :3] * 1.5, logits.softmax(dim=1), atol=1e-6)
    found[:, 1].sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in detector.parameters())


def test_a_classifiers_threshold_decides_what_is_rejected(vit):
    largest = open_detector(str(vit), threshold=0.01)(images())["class"].max(dim=1).values * 1.01
    middle = largest.median().item() + 1e-4
    readings = read(open_detector(str(vit), threshold=middle), images())
    assert readings.rejected().tolist() == (largest < middle).tolist()
    assert 0 < readings.rejected().sum() < 6


def test_clip_tells_labels_apart_by_their_prompts(clip):
    detector = open_detector(str(clip), labels={"animal": ["cat", "dog"], "size": {"big": "a cat of dog"}})
    assert detector.groups == {"animal": ("cat", "dog"), "size": ("big",)}
    pixels = images().requires_grad_()
    found = detector(pixels)
    assert {group: tuple(p.shape) for group, p in found.items()} == {"animal": (6, 3), "size": (6, 2)}
    # The same from the stock model: softmax over the label prompts and the four prompts for nothing.
    model = CLIPModel.from_pretrained(clip).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    nothing = ["a blank image", "random noise", "an abstract pattern", "a blurry, broken image"]
    tokens = tokenizer(["a photo of a cat", "a photo of a dog", *nothing], padding=True, return_tensors="pt")
    expected = model(pixel_values=detector.preprocessing(pixels), **tokens).logits_per_image.softmax(dim=1)
    expected = torch.cat([expected[:, :2], expected[:, 2:].sum(dim=1, keepdim=True)], dim=1)
    assert torch.allclose(found["animal"], expected, atol=1e-5)
    found["animal"][:, 0].sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_clips_threshold_moves_its_rejections(clip):
    labels = {"animal": ["cat", "dog"]}
    plain = open_detector(str(clip), labels=labels)(images())["animal"]
    strict = open_detector(str(clip), labels=labels, threshold=0.6)(images())["animal"]
    assert torch.allclose(strict[:, 2], (plain[:, 2] + 0.6) / 1.6) and torch.allclose(
        strict[:, :2], plain[:, :2] / 1.6
    )


def test_detectors_give_features_for_fidelity(vit, clip):
    zero_shot = open_detector(str(clip), labels={"animal": ["cat"]})
    assert torch.allclose(extract(zero_shot.features, images()).norm(dim=1), torch.ones(6).double())
    classifier = open_detector(str(vit))
    assert extract(classifier.features, images(), batch_size=4).shape == (6, 16)
    assert torch.allclose(extract(classifier.features, images(), batch_size=4), extract(classifier.features, images()))
    convolutional = ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[4, 6], depths=[1, 1], num_stages=2))
    detector = ImageClassifier(convolutional, Preprocessing(None))
    assert detector.features(images(2, 32)).shape == (2, 6)


def test_options_without_use_are_refused(vit, clip):
    with pytest.raises(ValueError, match="labels of its own"):
        open_detector(str(vit), labels={"class": ["cat"]})
    with pytest.raises(ValueError, match="say which labels"):
        open_detector(str(clip))
    with pytest.raises(ValueError, match="takes no threshold"):
        open_detector("ink", threshold=0.5)
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        open_detector(str(vit), threshold=1.5)
    with pytest.raises(ValueError, match="needs labels in every group"):
        open_detector(str(clip), labels={"animal": []})
    with pytest.raises(ValueError, match="has 59 tokens and this model reads 24"):
        open_detector(str(clip), labels={"animal": {"cat": "a photo of a " + "cat " * 16}})


def test_labels_that_do_not_exclude_each_other_are_refused(vit):
    model = ViTForImageClassification.from_pretrained(vit)
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="do not exclude each other"):
        ImageClassifier(model, Preprocessing(None))


def test_all_fill_the_protocol(vit, clip):
    for detector in (open_detector(str(vit)), open_detector(str(clip), labels={"animal": ["cat"]})):
        assert isinstance(detector, Detector) and not detector.training
        assert not any(parameter.requires_grad for parameter in detector.parameters())


def test_inks_detector_is_found_by_name(tmp_path, monkeypatch):
    torch.manual_seed(0)
    made = InkDetector(width=16).eval()
    made.save(tmp_path / detectors.INK_ASSET)
    monkeypatch.setattr(detectors, "files", lambda package: {"sublimate.assets": tmp_path}[package])
    opened = open_detector("ink")
    assert opened.groups == GROUPS and isinstance(opened, Detector)
    assert torch.equal(opened(images(size=32))["digit"], made(images(size=32))["digit"])


def test_a_cubic_kernel_does_not_leave_the_range_of_pixels():
    checkered = torch.zeros(1, 3, 8, 8)
    checkered[..., ::4] = 1
    enlarged = Preprocessing((32, 32), mode="bicubic")(checkered)
    assert enlarged.min() == 0 and enlarged.max() == 1
