"""The log-mel frames of many clips at once, on the device: what `quasr.audio.mel.log_mel` computes, in torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quasr.audio.mel import DYNAMIC_RANGE, FLOOR, HOP, MIN_SAMPLES, N_FFT, mel_filters
from quasr.model.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SLICE_FRAMES = 4096
"""Frames transformed at a time: 13 MB of samples in float64 and as much of their spectrum."""


def frame_count(samples: int) -> int:
    """Mel frames of a clip of so many samples."""
    return max(samples, MIN_SAMPLES) // HOP


@dataclass(frozen=True, slots=True)
class _Laid:
    """Clips end to end, each reflected at its ends and padded so that the next begins at a whole hop.

    starts: for each frame the hop at which it begins; clips: for each frame its clip. Both (frames,) int64.
    """

    samples: NDArray[np.float32]
    starts: NDArray[np.int64]
    clips: NDArray[np.int64]


def packed_log_mel(clips: Sequence[NDArray[np.float32]], mel_bins: int, device: torch.device) -> Tensor:
    """Clips of (n,) samples at 16 kHz -> (frames of all, mel_bins) float32, clip after clip.

    In float64 as `log_mel` is, the filters too: within 1e-5 of it. Nothing waits for the device.
    """
    laid = _lay_out(clips)
    windows = to_device(laid.samples, device).unfold(0, N_FFT, HOP)
    starts, owners = to_device(laid.starts, device), to_device(laid.clips, device)
    parts = [_decibels(windows[part], mel_bins) for part in starts.split(SLICE_FRAMES)]
    mel = torch.cat(parts)
    peaks = mel.new_full((len(clips),), float("-inf")).scatter_reduce(0, owners, mel.amax(1), "amax")
    return mel.maximum(peaks[owners, None] - DYNAMIC_RANGE).add_(4).div_(4)


def _lay_out(clips: Sequence[NDArray[np.float32]]) -> _Laid:
    counts = [frame_count(len(clip)) for clip in clips]
    padded = [_padded(clip) for clip in clips]
    begins = np.cumsum([0] + [len(clip) // HOP for clip in padded[:-1]])
    starts = [np.arange(begin, begin + count) for begin, count in zip(begins, counts, strict=True)]
    return _Laid(np.concatenate(padded), np.concatenate(starts), np.repeat(np.arange(len(clips)), counts))


def _padded(clip: NDArray[np.float32]) -> NDArray[np.float32]:
    whole = np.pad(clip, (0, max(0, MIN_SAMPLES - len(clip))))
    reflected = np.pad(whole, N_FFT // 2, mode="reflect")
    return np.pad(reflected, (0, -len(reflected) % HOP))


def _decibels(windows: Tensor, mel_bins: int) -> Tensor:
    """(frames, 400) -> log10 of the floored mel power (frames, mel_bins) float32."""
    window, filters = _constants(mel_bins, windows.device)
    spectrum = torch.fft.rfft(windows.double() * window)
    power = spectrum.real.square() + spectrum.imag.square()
    return (power @ filters).clamp_(min=FLOOR).log10_().float()


@cache
def _constants(mel_bins: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The periodic Hann window sin^2(pi n / N), and the filters (201, mel_bins), in float64."""
    with torch.inference_mode(False):
        window = torch.from_numpy(np.sin(np.pi * np.arange(N_FFT) / N_FFT) ** 2)
        return window.to(device), torch.from_numpy(mel_filters(mel_bins)).double().to(device)
