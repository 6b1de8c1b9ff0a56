"""A student whose text encoders train: which weights, what it shares, and where its gradients come from."""

import copy

import pytest
import torch

from sublimate.erasure.prompt_bank import PromptBank
from sublimate.erasure.text_student import TextBank, TextStudent, select_text, text_encoders
from sublimate.pipelines.model import open_model
from sublimate.training.players import PlayerConfig
from sublimate.training.randomness import SampleRandom

# Parameters per block of a CLIP: two linear layers in the MLP, four in self-attention, each with a bias.
MLP, ATTENTION = 4, 8


@pytest.fixture(params=["tiny_sd", pytest.param("tiny_sd3", marks=pytest.mark.slow)])
def model(request):
    return open_model(request.getfixturevalue(request.param))


def student_of(model, rule="mlp-final-attn"):
    return TextStudent(model, select_text(text_encoders(model), rule), PlayerConfig())


@pytest.mark.parametrize(
    ("rule", "count"),
    [("mlp", 2 * MLP), ("mlp-final-attn", 2 * MLP + ATTENTION), ("attn", 2 * ATTENTION), ("mlp-attn", 24)],
)
def test_the_rules_choose_from_every_clip(model, rule, count):
    encoders = text_encoders(model)
    names = select_text(encoders, rule)
    assert {name.split(".")[0] for name in names} == encoders.keys()
    assert len(names) == count * len(encoders)
    if rule == "mlp-final-attn":
        assert {name.split(".layers.")[1][0] for name in names if "self_attn" in name} == {"1"}
    everything = {f"{c}.{n}" for c, encoder in encoders.items() for n, _ in encoder.named_parameters()}
    assert names < select_text(encoders, "all") == everything


def test_only_clips_are_moved(tiny_sd3):
    assert list(text_encoders(open_model(tiny_sd3))) == ["text_encoder", "text_encoder_2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "problem"),
    [("tiny_unconditional", "no CLIP"), ("tiny_audio", "no CLIP"), ("tiny_inpainting", "sees pictures")],
)
def test_models_without_such_encoders_are_refused(family, problem, request):
    with pytest.raises(ValueError, match=problem):
        text_encoders(open_model(request.getfixturevalue(family)))


def test_bad_rules_and_precisions_are_refused(tiny_sd):
    model = open_model(tiny_sd)
    with pytest.raises(ValueError, match="no text rule 'x'"):
        select_text(text_encoders(model), "x")
    with pytest.raises(ValueError, match="float32"):
        student_of(model.to(dtype=torch.bfloat16))


def test_what_does_not_train_is_the_models_own_storage(model):
    student, own = student_of(model), model.parameters()
    moving = student.keyed(student.player.trainable())
    for component, encoder in student.encoders.items():
        for name, parameter in encoder.named_parameters():
            key = f"{component}/{name}"
            assert (parameter.data_ptr() == own[key].data_ptr()) == (key not in moving)
    assert moving.keys() <= own.keys()


def test_the_student_says_what_the_moved_encoders_say_and_the_model_does_not(model):
    student, prompts = student_of(model), ["a red cat", ""]
    before = model.encode_prompts(prompts)
    with torch.no_grad():
        for parameter in student.player.trainable().values():
            parameter.add_(0.05)
    moved = student.encode_prompts(prompts)
    for key, value in model.encode_prompts(prompts).items():
        assert torch.equal(value, before[key]) and not torch.allclose(value, moved[key])
    with torch.no_grad():
        for key, value in student.keyed(student.player.trainable()).items():
            model.parameters()[key].copy_(value)
    for key, value in model.encode_prompts(prompts).items():
        torch.testing.assert_close(value, moved[key])


def test_gradients_are_those_of_training_the_model_itself(tiny_sd):
    model = open_model(tiny_sd)
    whole = copy.deepcopy(model.component("text_encoder")).requires_grad_(True)
    student = student_of(model)
    student.player.set_trainable(True)
    bank = TextBank(model, student, [["cat", "a cat"], ["dog"]])
    x = torch.randn((2, *model.latent_shape), generator=torch.Generator().manual_seed(0))
    model.denoiser(x, 500, bank.condition(torch.tensor([1, 2]), "cpu")).output.square().sum().backward()
    ids = model.pipeline.tokenizer(["a cat", "dog"], padding="max_length", return_tensors="pt").input_ids
    told = {"text": whole(ids).last_hidden_state}
    model.denoiser(x, 500, type(model.null_condition())(told)).output.square().sum().backward()
    for name, parameter in student.player.trainable().items():
        expected = dict(whole.named_parameters())[name.removeprefix("text_encoder.")].grad
        torch.testing.assert_close(parameter.grad, expected)
    assert all(p.grad is None for p in model.denoiser.parameters())


def test_a_bank_draws_and_says_what_a_prompt_bank_does(model):
    groups = [["cat", "a cat"], ["dog"]]
    ours, theirs = TextBank(model, student_of(model), groups), PromptBank(model, groups)
    rows = ours.draw(SampleRandom(0, 0, "x", range(6)))
    assert torch.equal(rows, theirs.draw(SampleRandom(0, 0, "x", range(6))))
    for key, value in ours.condition(rows, "cpu").items():
        torch.testing.assert_close(value, theirs.condition(rows, "cpu")[key], rtol=1e-4, atol=1e-6)
