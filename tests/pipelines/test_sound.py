"""Spectrograms are played as the stock pipeline plays them, and WAV files hold the samples they were given."""

import wave
from io import BytesIO

import pytest
import torch

from sublimate.pipelines.generate import generate
from sublimate.pipelines.model import open_model
from sublimate.pipelines.sampling import image_generator
from sublimate.pipelines.sound import to_wav, waveforms


@pytest.mark.slow
@torch.no_grad()
def test_sounds_are_the_stock_pipelines(tiny_audio):
    model = open_model(tiny_audio)
    played, rate = waveforms(model, generate(model, ["a red cat"], steps=1, guidance_scale=1.0, seed=3))
    model.pipeline.set_progress_bar_config(disable=True)
    model.pipeline.scheduler = model.backbone.one_step(model.pipeline).scheduler
    stock = model.pipeline(
        ["a red cat"], num_inference_steps=1, guidance_scale=1.0, generator=[image_generator(3, 0)], output_type="pt"
    ).audios
    assert (played.shape, rate) == ((1, 256), 16000)
    torch.testing.assert_close(played, stock, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_gradients_reach_the_spectrogram(tiny_audio):
    spectrogram = torch.ones(1, 1, 16, 8, requires_grad=True)
    waveforms(open_model(tiny_audio), spectrogram)[0].square().sum().backward()
    assert bool((spectrogram.grad != 0).any())


def test_a_wav_file_holds_the_samples():
    waveform = torch.tensor([0.0, 0.5, -1.0, 1.0, 3.0])
    with wave.open(BytesIO(to_wav(waveform, 16000))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
        samples = torch.frombuffer(bytearray(file.readframes(5)), dtype=torch.int16)
    assert samples.tolist() == [0, 16384, -32767, 32767, 32767]


def test_what_is_no_sound_is_refused(tiny_sd):
    with pytest.raises(ValueError, match="has no network 'vocoder'"):
        waveforms(open_model(tiny_sd), torch.zeros(1, 1, 16, 8))
    with pytest.raises(ValueError, match=r"not \(1, 4\)"):
        to_wav(torch.zeros(1, 4), 16000)
    with pytest.raises(ValueError, match="not finite"):
        to_wav(torch.full((4,), torch.inf), 16000)
