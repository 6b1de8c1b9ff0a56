"""What sets sound apart from images: spectrograms, prompts encoded one by one, masked text, what stock cannot do."""

import pytest
import torch

from sublimate.pipelines.export import export_lora
from sublimate.pipelines.few_steps import FewSteps
from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.training.players import PlayerConfig, make_player

PROMPTS = ["a painting in the style of van gogh", "a red cat", "a dog in style"]


@pytest.fixture(scope="module")
def model(tiny_audio):
    return open_model(tiny_audio)


def test_spectrogram_sizes(model):
    assert model.latent_shape == (4, 8, 4)
    assert model.backbone.latent_shape(model.pipeline, 32, 8) == (4, 16, 4)
    with pytest.raises(ValueError, match="multiple of 2 frames, not 15"):
        model.backbone.latent_shape(model.pipeline, 15)
    with pytest.raises(ValueError, match="have 8 mel bins, not 16"):
        model.backbone.latent_shape(model.pipeline, 16, 16)
    with pytest.raises(ValueError, match=r"encodes spectrograms .* not \(1, 3, 16, 8\)"):
        model.encode(torch.zeros(1, 3, 16, 8))


@pytest.mark.slow
def test_spectrograms_are_drawn_without_bounds(model):
    drawn = generate(model, PROMPTS[:2], steps=2, seed=1)
    assert drawn.shape == (2, 1, 16, 8) and float(drawn.min()) < 0
    alone = generate(model, PROMPTS[:2], steps=2, seed=1, batch_size=1)
    torch.testing.assert_close(alone, drawn, atol=1e-5, rtol=0)
    assert generate(model, PROMPTS[:1], steps=1, height=32).shape == (1, 1, 32, 8)


@torch.no_grad()
def test_a_prompt_is_encoded_as_if_alone(model):
    # In the stock pipeline it depends on its neighbours: the language model's positions count their padding.
    together = model.encode_prompts(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        for key, value in model.encode_prompts([prompt]).items():
            torch.testing.assert_close(together.index(i)[key], value, atol=1e-6, rtol=0)
    stock = [model.pipeline.encode_prompt(prompts, "cpu", 1, False)[2][-1] for prompts in (PROMPTS, PROMPTS[-1:])]
    assert float((stock[0] - stock[1]).abs().max()) > 1e-3


@torch.no_grad()
def test_what_is_no_token_is_masked(model):
    x_t, condition = torch.randn(3, 4, 8, 4), model.encode_prompts(PROMPTS)
    noisy = torch.where(condition["text.mask"][..., None] == 1, condition["text.t5"], 100.0)
    changed = model.denoiser(x_t, 500.0, condition.replace(**{"text.t5": noisy}))
    torch.testing.assert_close(changed.output, model.denoiser(x_t, 500.0, condition).output, atol=1e-6, rtol=0)


def test_no_row_of_mixed_text_is_a_concepts(model):
    (t5,) = model.prompt_rows("a red cat")
    assert (t5.key, t5.rows) == ("text.t5", slice(0, 3))
    with pytest.raises(ValueError, match="edits by whole prompts"):
        model.find_concept("a red cat", "cat")


def test_what_the_stock_pipeline_cannot_do_is_refused(model, tmp_path):
    backbone, pipe = model.backbone, model.pipeline
    with pytest.raises(ValueError, match="set guidance_scale to 1"):
        backbone.few_steps(pipe, FewSteps("consistency", guidance_scale=2.0))
    with pytest.raises(ValueError, match="cannot be told timesteps"):
        backbone.few_steps(pipe, FewSteps("consistency", steps=2, times=(999, 123)))
    player = make_player(model.denoiser, PlayerConfig(kind="lora", rank=2))
    with pytest.raises(ValueError, match="AudioLDM2Pipeline loads no LoRA"):
        export_lora(model, player.module, tmp_path / "lora")


@pytest.mark.slow
def test_speech_that_reads_transcriptions_is_refused(tiny_audio):
    model = open_model(tiny_audio)
    model.pipeline.text_encoder_2.config.model_type = "vits"
    with pytest.raises(ValueError, match="use a checkpoint with a T5 encoder"):
        model.encode_prompts(["a cat"])
