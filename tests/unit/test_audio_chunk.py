"""The cut rule of the official package, streaming."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quasr.audio.chunk import cut_position, pieces
from quasr.errors import OptionError

RATE = 16_000


def in_blocks(samples: np.ndarray, size: int) -> list[np.ndarray]:
    return [samples[at : at + size] for at in range(0, len(samples), size)]


def reference_cuts(samples: np.ndarray, limit: int, search: int, window: int = 1600) -> list[int]:
    """The official rule (docs/model.md) over the whole array, with window sums by plain convolution."""
    cuts, start = [], 0
    while len(samples) - start > limit:
        left, right = start + limit - search, min(len(samples), start + limit + search)
        level = np.abs(samples[left:right].astype(np.float64))
        cut = start + limit
        if len(level) > window:
            quiet = int(np.argmin(np.convolve(level, np.ones(window), mode="valid")))
            cut = left + quiet + int(np.argmin(level[quiet : quiet + window]))
        cuts.append(cut)
        start = cut
    return cuts


def test_vector_of_the_official_package() -> None:
    noise = np.random.default_rng(0).standard_normal(400 * RATE).astype(np.float32)
    noise[183 * RATE : int(183.4 * RATE)] = 0
    found = list(pieces(in_blocks(noise, 10 * RATE), 180.0))
    assert [round(len(piece.samples) / RATE, 2) for piece in found] == [183.0, 175.76, 41.24]
    assert found[0].end == found[1].start == 183.0
    assert found[-1].end == 400.0


def test_matches_the_plain_rule_on_noise() -> None:
    rng = np.random.default_rng(1)
    for seconds, limit in ((95.3, 30.0), (61.0, 12.0), (30.0, 30.0), (30.01, 30.0), (40.0, 7.0)):
        samples = (rng.standard_normal(int(seconds * RATE)) * rng.uniform(0.1, 1, int(seconds * RATE))).astype(
            np.float32
        )
        search = int(min(5.0, limit / 2) * RATE)
        found = list(pieces([samples], limit))
        ends = [round(piece.end * RATE) for piece in found[:-1]]
        assert ends == reference_cuts(samples, int(limit * RATE), search)


def test_cuts_in_the_pause_and_at_the_first_of_equals() -> None:
    samples = np.ones(60 * RATE, np.float32)
    samples[27 * RATE : 27 * RATE + 4000] = 0
    samples[33 * RATE : 33 * RATE + 4000] = 0
    assert cut_position(samples, 30 * RATE, 5 * RATE) == 27 * RATE
    assert cut_position(np.ones(60 * RATE, np.float32), 30 * RATE, 5 * RATE) == 25 * RATE
    assert cut_position(np.ones(100, np.float32), 50, 10) == 50


def test_short_audio_is_one_piece_and_none_is_none() -> None:
    samples = np.ones(30 * RATE, np.float32)
    (only,) = pieces(in_blocks(samples, 1000), 30.0)
    assert only.start == 0.0
    np.testing.assert_array_equal(only.samples, samples)
    assert list(pieces([], 30.0)) == []
    assert list(pieces([np.empty(0, np.float32)], 30.0)) == []


def test_pieces_come_as_soon_as_they_can() -> None:
    taken = 0

    def blocks() -> object:
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield np.ones(RATE, np.float32)

    next(pieces(blocks(), 30.0))
    assert taken == 35


@pytest.mark.parametrize(
    ("limit", "search"), [(0.0, 5.0), (-1.0, 5.0), (math.nan, 5.0), (math.inf, 5.0), (30.0, -1.0), (30.0, math.nan)]
)
def test_bad_options(limit: float, search: float) -> None:
    with pytest.raises(OptionError):
        list(pieces([np.ones(10, np.float32)], limit, search))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seconds=st.floats(0, 12),
    limit=st.floats(0.01, 6),
    search=st.floats(0, 6),
    block=st.integers(100, 50_000),
    seed=st.integers(0, 9),
    silence=st.booleans(),
)
def test_properties(seconds: float, limit: float, search: float, block: int, seed: int, silence: bool) -> None:
    samples = np.random.default_rng(seed).standard_normal(int(seconds * RATE)).astype(np.float32)
    if silence:
        samples[len(samples) // 3 : len(samples) // 2] = 0
    found = list(pieces(in_blocks(samples, block), limit, search))
    whole = list(pieces([samples], limit, search))
    assert [piece.start for piece in found] == [piece.start for piece in whole]
    np.testing.assert_array_equal(
        np.concatenate([np.empty(0, np.float32), *(piece.samples for piece in found)]), samples
    )
    reach = min(search, limit / 2)
    assert all(0 < len(piece.samples) <= (limit + reach) * RATE + 2 for piece in found)
    assert all(len(piece.samples) >= (limit - reach) * RATE - 2 for piece in found[:-1])
    assert all(first.end == second.start for first, second in pairwise(found))
