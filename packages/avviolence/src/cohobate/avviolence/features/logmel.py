"""VGGish's log-mel spectrogram, exactly, and its patches on the snippet grid."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from cohobate.avviolence.data.features import SNIPPET_SECONDS
from cohobate.avviolence.features.media import SAMPLE_RATE

WINDOW, HOP, FFT, BANDS = 400, 160, 512, 64
PATCH_FRAMES = 96
PATCH_SAMPLES = (PATCH_FRAMES - 1) * HOP + WINDOW


@cache
def mel_matrix() -> Tensor:
    """Weights from 257 FFT bins to 64 mel bands, ``(257, 64)`` float64.

    Triangles between 125 and 7500 Hz, equally spaced and linear in ``1127 ln(1 + f / 700)``.
    """
    from transformers.audio_utils import mel_filter_bank  # seconds to import

    weights = mel_filter_bank(
        FFT // 2 + 1,
        BANDS,
        125.0,
        7500.0,
        SAMPLE_RATE,
        norm=None,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    return torch.from_numpy(weights)


def log_mel(waveform: Tensor) -> Tensor:
    """Log-mel spectrogram as VGGish takes it.

    Magnitudes of frames of 25 ms every 10 ms (periodic Hann window, no padding), summed in mel
    bands, ``ln(mel + 0.01)``.

    Args:
        waveform: ``(..., samples)`` at 16 kHz in [-1, 1], at least 400 samples.

    Returns:
        ``(..., 1 + (samples - 400) // 160, 64)`` in the dtype of ``waveform``.

    Example:
        >>> log_mel(torch.zeros(16000)).shape, log_mel(torch.zeros(400))[0, 0]
        (torch.Size([98, 64]), tensor(-4.6052))
    """
    # In double precision: single rounds the log by more than 1e-5 where it is quiet.
    exact = waveform.double()
    window = torch.hann_window(WINDOW, periodic=True, dtype=torch.float64, device=exact.device)
    magnitude = torch.fft.rfft(exact.unfold(-1, WINDOW, HOP) * window, FFT).abs()
    return (magnitude @ mel_matrix().to(exact.device) + 0.01).log().to(waveform.dtype)


def snippet_sound(waveform: np.ndarray, numbers: range) -> Tensor:
    """Cut for each snippet the sound that ends with it.

    Args:
        waveform: ``(samples,)`` at 16 kHz from the time of the first picture.
        numbers: Which snippets, from 0.

    Returns:
        ``(N, 15600)``: 96 log-mel frames each (0.975 s of samples); silence where the waveform has
        not begun or has ended.
    """
    ends = np.rint((np.array(numbers) + 1) * SNIPPET_SECONDS * SAMPLE_RATE).astype(np.int64)
    places = ends[:, None] + np.arange(-PATCH_SAMPLES, 0)
    inside = (places >= 0) & (places < len(waveform))
    sound = np.zeros(places.shape, np.float32)
    sound[inside] = waveform[places[inside]]
    return torch.from_numpy(sound)
