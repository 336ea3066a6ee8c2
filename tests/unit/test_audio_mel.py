"""Log-mel against the formula written out plainly, and against transformers' extractor."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest

from quasr.audio.mel import log_mel, mel_filters

RATE = 16_000
LENGTHS = [0.02, 0.3, 0.4999, 0.5, 1.0, 1.005, 7.99, 8.01, 29.3, 61.7]


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(round(seconds * RATE)).astype(np.float32) * np.float32(0.1)


def speech_like(seconds: float) -> np.ndarray:
    """Harmonics of a gliding voice, loud and quiet by turns, over faint noise."""
    time = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * time)) / RATE
    voice = sum(np.sin(k * phase) / k for k in range(1, 30))
    loud = 0.5 + 0.5 * np.sin(2 * np.pi * 2.3 * time)
    return (0.1 * loud * voice + 1e-3 * np.random.default_rng(3).standard_normal(len(time))).astype(np.float32)


CLIPS = {f"{kind.__name__} {seconds}": (kind, seconds) for kind in (noise, speech_like) for seconds in LENGTHS}


@cache
def extractor() -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers.models.qwen3_asr.feature_extraction_qwen3_asr")
    torch.set_num_threads(1)
    return transformers.Qwen3ASRFeatureExtractor()


def extracted(samples: np.ndarray) -> np.ndarray:
    """What transformers gives for this clip alone, without its padding to whole chunks."""
    return extractor()(samples, sampling_rate=RATE, padding="longest", n_window=0, return_tensors="np")[
        "input_features"
    ][0]


def formula(samples: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """The definition (docs/model.md) frame by frame: a matrix DFT in float64, no FFT."""
    padded = np.pad(samples.astype(np.float64), (0, max(0, 8000 - len(samples))))
    padded = np.concatenate([padded[200:0:-1], padded, padded[-2:-202:-1]])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    dft = np.exp(-2j * np.pi * np.outer(np.arange(400), np.arange(201)) / 400)
    count = (len(padded) - 400) // 160
    frames = np.stack([padded[160 * i : 160 * i + 400] for i in range(count)])
    log = np.log10(np.maximum(np.abs((frames * window) @ dft) ** 2 @ filters, 1e-10)).T
    return (np.maximum(log, log.max() - 8) + 4) / 4


@cache
def sound(clip: str) -> np.ndarray:
    kind, seconds = CLIPS[clip]
    return kind(seconds)


@cache
def exact(clip: str) -> np.ndarray:
    return formula(sound(clip), extractor().mel_filters)


@pytest.mark.parametrize("clip", CLIPS)
def test_equals_the_formula_with_the_filters_of_transformers(clip: str) -> None:
    samples = sound(clip)
    mel = log_mel(samples)
    expected = exact(clip)
    assert mel.dtype == np.float32
    assert mel.shape == expected.shape == (128, max(len(samples), 8000) // 160)
    np.testing.assert_allclose(mel, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("clip", CLIPS)
def test_equals_the_extractor_of_transformers(clip: str) -> None:
    """Within 1e-5, but for the few quiet bins where the extractor's own float32 transform is further off than that."""
    samples = sound(clip)
    mel, theirs = log_mel(samples), extracted(samples)
    error = np.abs(mel - theirs)
    assert mel.shape == theirs.shape
    assert np.all(error <= 1e-5 + np.abs(theirs - exact(clip)))
    assert float(np.mean(error > 1e-5)) < 1e-3
    assert float(error.max()) < 1e-4


def test_filters_are_those_of_transformers() -> None:
    np.testing.assert_allclose(mel_filters(128), extractor().mel_filters, atol=1e-8)
    utils = pytest.importorskip("transformers.audio_utils")
    expected = utils.mel_filter_bank(201, 80, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(80), expected, atol=1e-8)
    assert log_mel(noise(1.0), mel_bins=80).shape == (80, 100)


def test_silence_and_nothing_are_the_floor() -> None:
    for samples in (np.zeros(20_000, np.float32), np.zeros(0, np.float32)):
        mel = log_mel(samples)
        assert mel.shape[1] == max(len(samples), 8000) // 160
        np.testing.assert_allclose(mel, (-10 + 4) / 4, atol=1e-6)


def test_a_tone_peaks_in_its_own_bin() -> None:
    centres = np.argmax(mel_filters(128), axis=0) * RATE / 400
    for hz in (400.0, 1000.0, 3000.0, 6000.0):
        tone = np.sin(2 * np.pi * hz * np.arange(RATE) / RATE).astype(np.float32)
        assert abs(centres[int(np.argmax(log_mel(tone)[:, 50]))] - hz) <= 120


def test_input_is_left_alone_and_range_is_eight_decades() -> None:
    samples = speech_like(2.0)
    before = samples.copy()
    mel = log_mel(samples)
    np.testing.assert_array_equal(samples, before)
    assert float(mel.max() - mel.min()) <= 2.0 + 1e-6


MEMORY_SCRIPT = """
import numpy as np, tracemalloc
from quasr.audio.mel import log_mel
samples = np.random.default_rng(0).standard_normal(1200 * 16000, dtype=np.float32)
log_mel(samples[:16000])
tracemalloc.start()
mel = log_mel(samples)
print(mel.nbytes, tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.slow
def test_memory_on_twenty_minutes() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    result, peak = map(int, done.stdout.split())
    padded = 1200 * RATE * 4
    # The padded clip twice, the frames twice (before and after the transpose); all windows at once would be 384 MB.
    assert peak < 2 * padded + 2 * result + 16e6


@pytest.mark.parametrize("clip", CLIPS)
def test_equals_the_numpy_extractor_of_transformers_everywhere(clip: str) -> None:
    """The extractor that the original checkpoints name, on its float64 path: within 1e-5 in every bin."""
    transformers = pytest.importorskip("transformers")
    samples = sound(clip)
    padded = np.pad(samples, (0, max(0, 8000 - len(samples))))
    theirs = transformers.WhisperFeatureExtractor(feature_size=128)._np_extract_fbank_features(padded[None], "cpu")[0]
    np.testing.assert_allclose(log_mel(samples), theirs, atol=1e-5, rtol=0)
