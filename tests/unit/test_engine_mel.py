"""The mel frames that torch makes of many clips, against the numpy ones of each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quasr.audio.mel import log_mel
from quasr.engine import mel_torch
from quasr.engine.mel_torch import frame_count, packed_log_mel

CPU = torch.device("cpu")
LENGTHS = [1, 7_999, 8_000, 8_001, 8_159, 8_160, 23_456, 160_000]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def clip(samples: int, seed: int) -> np.ndarray:
    """Each of another loudness, so that one clip's maximum would be wrong for the next."""
    rng = np.random.default_rng(seed)
    return (10.0 ** -(seed % 5) * rng.standard_normal(samples)).astype(np.float32)


@pytest.mark.parametrize("bins", [16, 128])
def test_frames_are_those_of_each_clip_alone(bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mel_torch, "SLICE_FRAMES", 100)
    clips = [clip(length, seed) for seed, length in enumerate(LENGTHS)]
    expected = [log_mel(one, bins) for one in clips]
    assert [mel.shape[1] for mel in expected] == [frame_count(length) for length in LENGTHS]
    found = packed_log_mel(clips, bins, CPU)
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - np.concatenate(expected, axis=1).T).max() < 1e-5


def test_silence_and_a_tone_have_the_floor() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32)
    found = packed_log_mel([np.zeros(16_000, np.float32), tone], 128, CPU).numpy()
    assert found[:100] == pytest.approx((np.log10(1e-10) + 4) / 4)
    assert np.abs(found[100:] - log_mel(tone).T).max() < 1e-5
