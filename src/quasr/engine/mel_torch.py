"""The log-mel frames of many clips at once, on the device: what `quasr.audio.mel.log_mel` computes, in torch."""

from __future__ import annotations

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


def packed_log_mel(clips: Sequence[NDArray[np.float32]], mel_bins: int, device: torch.device) -> Tensor:
    """Clips of (n,) samples at 16 kHz -> (frames of all, mel_bins) float32, clip after clip.

    In float64 as `log_mel` is, the filters too: within 1e-5 of it. Nothing waits for the device.
    """
    counts = [frame_count(len(clip)) for clip in clips]
    sizes = [_padded_size(len(clip)) for clip in clips]
    hops = np.cumsum([0, *sizes[:-1]]) // HOP
    starts = np.concatenate([np.arange(hop, hop + count) for hop, count in zip(hops, counts, strict=True)])
    owners = to_device(np.repeat(np.arange(len(clips)), counts), device)
    windows = _end_to_end(clips, sizes, device).unfold(0, N_FFT, HOP)
    mel = torch.cat([_decibels(windows[part], mel_bins) for part in to_device(starts, device).split(SLICE_FRAMES)])
    peaks = mel.new_full((len(clips),), float("-inf")).scatter_reduce(0, owners, mel.amax(1), "amax")
    return mel.maximum(peaks[owners, None] - DYNAMIC_RANGE).add_(4).div_(4)


def _padded_size(samples: int) -> int:
    """Samples of a clip with its reflected ends, up to the next whole hop."""
    return -(-(max(samples, MIN_SAMPLES) + N_FFT) // HOP) * HOP


def _end_to_end(clips: Sequence[NDArray[np.float32]], sizes: Sequence[int], device: torch.device) -> Tensor:
    """(sum of sizes,) on `device`: each clip with its reflected ends, which for a GPU stood in page-locked memory."""
    host = torch.empty(sum(sizes), pin_memory=device.type == "cuda")
    for clip, part in zip(clips, host.split(list(sizes)), strict=True):
        _place(clip, part.numpy())
    return host.to(device, non_blocking=True)


def _place(clip: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    half, end = N_FFT // 2, N_FFT // 2 + max(len(clip), MIN_SAMPLES)
    out[half : half + len(clip)] = clip
    out[half + len(clip) :] = 0
    out[:half] = out[2 * half : half : -1]
    out[end : end + half] = out[end - 2 : end - 2 - half : -1]


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
