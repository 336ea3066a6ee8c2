"""Log-mel frames of one clip, as Whisper and Qwen3-ASR define them.

16 kHz, 25 ms periodic Hann windows every 10 ms, centred with reflection at the ends, power spectrum, last frame
dropped; Slaney mel filters from 0 to 8000 Hz; log10 floored at 1e-10 and at the clip's own maximum - 8; (x + 4) / 4.
The extractors of transformers do the transform in float32, which alone moves the quietest bins by up to about 4e-5;
here it is in float64, so that the result is the formula's within 1e-6 with every version of numpy.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from quasr.types import SAMPLE_RATE

if TYPE_CHECKING:
    from numpy.typing import NDArray

N_FFT = 400
HOP = 160
MIN_SAMPLES = 8000
MAX_FREQUENCY = 8000.0
FLOOR = 1e-10
DYNAMIC_RANGE = 8.0
SLICE_FRAMES = 128
"""Frames transformed at a time: 0.4 MB of float64, which stays in a core's cache, whatever the clip's length."""

LINEAR_HZ_PER_MEL = 200.0 / 3.0
LOG_FROM_HZ = 1000.0
LOG_FROM_MEL = LOG_FROM_HZ / LINEAR_HZ_PER_MEL
LOG_STEP = np.log(6.4) / 27.0
"""Slaney's scale (Auditory Toolbox): linear up to 1 kHz, then 27 steps for each factor of 6.4."""


def log_mel(samples: NDArray[np.float32], mel_bins: int = 128) -> NDArray[np.float32]:
    """(n,) samples at 16 kHz -> (mel_bins, max(n, 8000) // 160) log-mel frames of 10 ms, float32."""
    padded = np.pad(samples, (0, max(0, MIN_SAMPLES - len(samples))))
    frames = len(padded) // HOP
    mel = np.empty((frames, mel_bins), dtype=np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(padded, N_FFT // 2, mode="reflect"), N_FFT)[::HOP]
    for start in range(0, frames, SLICE_FRAMES):
        part = slice(start, min(start + SLICE_FRAMES, frames))
        mel[part] = _filtered(_power(windows[part]), mel_bins)
    return _compress(mel)


def _power(windows: NDArray[np.float32]) -> NDArray[np.float32]:
    """(frames, 400) -> (frames, 201) power spectrum."""
    spectrum = np.fft.rfft(windows * _hann(), axis=1)
    return (spectrum.real**2 + spectrum.imag**2).astype(np.float32)


def _filtered(power: NDArray[np.float32], mel_bins: int) -> NDArray[np.float32]:
    """(frames, 201) power -> (frames, mel_bins).

    Most of a filter is zero, so only its band is summed. A matrix product would not be slower where the machine is
    idle, but its threads wait for each other many times as long where it is not.
    """
    bins, weights, starts = _bands(mel_bins)
    return np.asarray(np.add.reduceat(power[:, bins] * weights, starts, axis=1))


def _compress(mel: NDArray[np.float32]) -> NDArray[np.float32]:
    """(frames, bins) power, overwritten -> (bins, frames) log scale."""
    np.log10(np.maximum(mel, np.float32(FLOOR), out=mel), out=mel)
    np.maximum(mel, mel.max() - np.float32(DYNAMIC_RANGE), out=mel)
    mel += np.float32(4)
    mel /= np.float32(4)
    return np.ascontiguousarray(mel.T)


@cache
def _hann() -> NDArray[np.float64]:
    """(400,) periodic Hann window: sin^2(pi n / N)."""
    return np.asarray(np.sin(np.pi * np.arange(N_FFT) / N_FFT) ** 2)


@cache
def mel_filters(mel_bins: int) -> NDArray[np.float32]:
    """(201, mel_bins) triangles, evenly spaced in mel, each of area 1 in Hz (Slaney's normalisation)."""
    edges = _mel_to_hz(np.linspace(0.0, _hz_to_mel(MAX_FREQUENCY), mel_bins + 2))
    bins = np.linspace(0.0, SAMPLE_RATE / 2, N_FFT // 2 + 1)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre))
    return np.asarray(np.maximum(triangles, 0.0) * (2.0 / (high - low)), dtype=np.float32)


@cache
def _bands(mel_bins: int) -> tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.intp]]:
    """The filters' bands behind one another: their bins, the weights of these, and where each filter begins."""
    filters = mel_filters(mel_bins)
    # A filter that lies between two bins keeps one of weight zero, for `reduceat` sums no empty band.
    bands = [np.flatnonzero(column) if column.any() else np.zeros(1, np.intp) for column in filters.T]
    weights = [column[band] for column, band in zip(filters.T, bands, strict=True)]
    starts = np.cumsum([0, *map(len, bands[:-1])])
    return np.concatenate(bands), np.concatenate(weights), starts


def _hz_to_mel(hz: float) -> float:
    if hz < LOG_FROM_HZ:
        return hz / LINEAR_HZ_PER_MEL
    return float(LOG_FROM_MEL + np.log(hz / LOG_FROM_HZ) / LOG_STEP)


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    curve = LOG_FROM_HZ * np.exp(LOG_STEP * (mel - LOG_FROM_MEL))
    return np.where(mel < LOG_FROM_MEL, mel * LINEAR_HZ_PER_MEL, curve)
