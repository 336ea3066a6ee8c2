"""The mel frames that torch makes of many clips, against the numpy ones of each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quasr.audio.mel import log_mel
from quasr.engine.mel_torch import FRAMES_MULTIPLE, frame_count, join, joined_size, packed_log_mel

LENGTHS = [1, 7_999, 8_000, 8_001, 8_159, 8_160, 23_456, 160_000]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def clip(samples: int, seed: int) -> np.ndarray:
    """Each of another loudness, so that one clip's maximum would be wrong for the next."""
    rng = np.random.default_rng(seed)
    return (10.0 ** -(seed % 5) * rng.standard_normal(samples)).astype(np.float32)


def packed(clips: list[np.ndarray], bins: int, slice_frames: int = 4096, device: str = "cpu") -> torch.Tensor:
    """Of memory that holds anything before."""
    lengths = [len(one) for one in clips]
    samples = torch.full((joined_size(lengths),), float("nan"))
    join(clips, samples.numpy())
    return packed_log_mel(samples.to(device), lengths, bins, slice_frames).cpu()


@pytest.mark.parametrize("slice_frames", [FRAMES_MULTIPLE, 5 * FRAMES_MULTIPLE, 40 * FRAMES_MULTIPLE])
@pytest.mark.parametrize("bins", [16, 128])
def test_frames_are_those_of_each_clip_alone(bins: int, slice_frames: int) -> None:
    """Slices are as large as they may be, smaller than that and of even size, and one for all."""
    clips = [clip(length, seed) for seed, length in enumerate(LENGTHS)]
    expected = [log_mel(one, bins) for one in clips]
    assert [mel.shape[1] for mel in expected] == [frame_count(length) for length in LENGTHS]
    found = packed(clips, bins, slice_frames)
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - np.concatenate(expected, axis=1).T).max() < 1e-5


def test_silence_and_a_tone_have_the_floor() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32)
    found = packed([np.zeros(16_000, np.float32), tone], 128).numpy()
    assert found[:100] == pytest.approx((np.log10(1e-10) + 4) / 4)
    assert np.abs(found[100:] - log_mel(tone).T).max() < 1e-5


def test_a_quiet_clip_is_floored_where_the_formula_says() -> None:
    """Its maximum is below the floor of all clips, or less than the dynamic range above it."""
    clips = [(level * clip(9_000, 5)).astype(np.float32) for level in (1e-9, 1e-4)]
    expected = np.concatenate([log_mel(one) for one in clips], axis=1).T
    assert (expected == expected.min()).mean() > 0.5
    assert np.abs(packed(clips, 128).numpy() - expected).max() < 1e-5


def test_numbers_that_are_none_stay_with_their_clip() -> None:
    clips = [clip(9_000, 0), np.full(9_000, np.nan, np.float32), clip(9_000, 2)]
    found = packed(clips, 16).isnan().view(3, -1)
    assert found.all(1).tolist() == [False, True, False]
    assert not found[::2].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_same_frames() -> None:
    clips = [clip(length, seed) for seed, length in enumerate(LENGTHS)]
    expected = np.concatenate([log_mel(one) for one in clips], axis=1).T
    assert np.abs(packed(clips, 128, device="cuda").numpy() - expected).max() < 1e-5
