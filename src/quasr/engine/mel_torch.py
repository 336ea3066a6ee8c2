"""The log-mel frames of many clips at once, on the device: what `quasr.audio.mel.log_mel` computes, in torch.

Clips lie end to end, each with its reflected ends up to a whole hop, so that the windows of all are one strided view.
Those that reach from one clip into the next are transformed too, and dropped: that is less work than gathering the
others.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quasr.audio.mel import DYNAMIC_RANGE, FLOOR, HOP, MIN_SAMPLES, N_FFT, mel_filters
from quasr.model.transfer import all_to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SLICE_FRAMES = 4096
"""Most frames transformed at a time: 13 MB of windows in float64 and as much of their spectrum."""

LARGE_SLICE = 8192
"""The same where memory is not planned: twice that, and half of the launches."""

FRAMES_MULTIPLE = 256
"""Frames are transformed in such numbers, because cuFFT makes and keeps a plan for each number."""


def frame_count(samples: int) -> int:
    """Mel frames of a clip of so many samples."""
    return max(samples, MIN_SAMPLES) // HOP


def padded_size(samples: int) -> int:
    """Samples of a clip with its reflected ends, up to the next whole hop."""
    return -(-(max(samples, MIN_SAMPLES) + N_FFT) // HOP) * HOP


def joined_size(lengths: Sequence[int]) -> int:
    """Samples of clips of these lengths end to end, and of the windows that fill up the last multiple of frames."""
    return (_windows(lengths) - 1) * HOP + N_FFT


def join(clips: Sequence[NDArray[np.float32]], out: NDArray[np.float32]) -> None:
    """Puts clips of (n,) samples end to end into the beginning of `out`, `padded_size` of each."""
    first = 0
    for clip in clips:
        size = padded_size(len(clip))
        _place(clip, out[first : first + size])
        first += size


def packed_log_mel(samples: Tensor, lengths: Sequence[int], mel_bins: int, slice_frames: int = SLICE_FRAMES) -> Tensor:
    """Clips of so many samples at 16 kHz, joined in `samples` (joined_size,) -> (frames of all, mel_bins) float32.

    In float64 as `log_mel` is, the filters too: within 1e-5 of it. Nothing waits for the device. At most `slice_frames`
    are transformed at a time, a multiple of FRAMES_MULTIPLE.
    """
    windows = samples.unfold(0, N_FFT, HOP)[: _windows(lengths)]
    mel = samples.new_empty(len(windows), mel_bins)
    size = _even_slice(len(windows), slice_frames)
    for part, out in zip(windows.split(size), mel.split(size), strict=True):
        _write_decibels(part, out)
    frames, owners = all_to_device(_frames(lengths), samples.device)
    mel = mel.index_select(0, frames)
    peaks = mel.new_full((len(lengths),), -math.inf).scatter_reduce_(0, owners, mel.amax(1), "amax")
    floors = peaks.sub_(DYNAMIC_RANGE).clamp_(min=math.log10(FLOOR))
    return torch.maximum(mel, floors[owners, None], out=mel).add_(4).div_(4)


def _windows(lengths: Sequence[int]) -> int:
    hops = sum(map(padded_size, lengths)) // HOP
    return -(-hops // FRAMES_MULTIPLE) * FRAMES_MULTIPLE


def _even_slice(windows: int, most: int) -> int:
    """Windows of each of as few slices as there can be."""
    slices = -(-windows // most)
    return -(-windows // (slices * FRAMES_MULTIPLE)) * FRAMES_MULTIPLE


def _frames(lengths: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each frame of each clip, the window that it is made of, and the clip."""
    counts = [frame_count(length) for length in lengths]
    hops = [padded_size(length) // HOP for length in lengths]
    owners = np.repeat(np.arange(len(lengths)), counts)
    # Windows of the clips before that are no frames.
    dropped = np.cumsum([0, *np.subtract(hops, counts)[:-1]])
    return np.arange(len(owners)) + dropped[owners], owners


def _place(clip: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    half, end = N_FFT // 2, N_FFT // 2 + max(len(clip), MIN_SAMPLES)
    out[half : half + len(clip)] = clip
    out[half + len(clip) :] = 0
    out[:half] = out[2 * half : half : -1]
    out[end : end + half] = out[end - 2 : end - 2 - half : -1]


def _write_decibels(windows: Tensor, out: Tensor) -> None:
    """(frames, 400) -> log10 of the mel power (frames, mel_bins) float32, minus infinity where there is none.

    The floor comes later, together with the clip's own. Products of both precisions are made in float64.
    """
    window, filters = _constants(out.shape[1], out.device)
    parts = torch.view_as_real(torch.fft.rfft(windows * window)).square_()
    torch.log10((parts[..., 0] + parts[..., 1]) @ filters, out=out)


@cache
def _constants(mel_bins: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The periodic Hann window sin^2(pi n / N), and the filters (201, mel_bins), in float64."""
    with torch.inference_mode(False):
        window = torch.from_numpy(np.sin(np.pi * np.arange(N_FFT) / N_FFT) ** 2)
        return window.to(device), torch.from_numpy(mel_filters(mel_bins)).double().to(device)
