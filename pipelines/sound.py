"""Sound: spectrograms played by a model's vocoder, and written as WAV files."""

from __future__ import annotations

import wave
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from sublimate.pipelines.model import Model


def waveforms(model: Model, spectrograms: Tensor) -> tuple[Tensor, int]:
    """What spectrograms sound like; differentiable in them.

    Args:
        model: of a family that makes audio.
        spectrograms: (N, 1, frames, bins), as `generate` draws them.

    Returns:
        (N, samples) float32, about [-1, 1], and the number of samples per second.

    Raises:
        ValueError: for a model without a vocoder.
    """
    vocoder: Any = model.component("vocoder")
    played = vocoder(spectrograms[:, 0].to(model.device, model.dtype))
    return played.float(), int(vocoder.config.sampling_rate)


def to_wav(waveform: Tensor, rate: int) -> bytes:
    """One waveform as a WAV file of 16 bits.

    Args:
        waveform: (samples,), float in [-1, 1]; values outside are clipped.
        rate: samples per second.

    Returns:
        The file's bytes.

    Raises:
        ValueError: for another shape, or values that are not finite.
    """
    if waveform.ndim != 1:
        raise ValueError(f"A waveform has shape (samples,), not {tuple(waveform.shape)}.")
    if not waveform.isfinite().all():
        raise ValueError("The waveform contains values that are not finite: check the model that made it.")
    samples = (waveform.float().clamp(-1, 1) * 32767).round().to("cpu", torch.int16)
    file = BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.numpy().astype("<i2").tobytes())
    return file.getvalue()
