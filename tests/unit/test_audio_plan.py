"""The cut plan against its own promises, on activity made up by hypothesis."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quasr.audio.plan import CutPlan, PlanOptions, Span, plan
from quasr.audio.vad import WINDOW_SECONDS, Activity
from quasr.errors import OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PADDING = round(0.3 / WINDOW_SECONDS)
MIN_SPEECH = 3


def activity(*runs: tuple[float, float], level: float = 0.1, excess: float = 0.0) -> Activity:
    """Runs of (probability, seconds)."""
    probability = np.repeat([p for p, _ in runs], [round(seconds / WINDOW_SECONDS) for _, seconds in runs])
    flat = np.ones(probability.size)
    return Activity(probability, level * flat, excess * flat)


def seconds(pieces: list[Span]) -> list[tuple[float, float]]:
    return [(piece.start * WINDOW_SECONDS, piece.end * WINDOW_SECONDS) for piece in pieces]


def runs_of(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def near(expected: list[tuple[float, float]]) -> list[object]:
    return [pytest.approx(pair, abs=2 * WINDOW_SECONDS) for pair in expected]


def test_silence_is_left_out_and_speech_is_padded() -> None:
    found = plan(activity((0.0, 5), (0.9, 3), (0.0, 60), (0.9, 2), (0.0, 9)), PlanOptions())
    assert seconds(found) == near([(4.7, 8.3), (67.7, 70.3)])


def test_short_pauses_stay_inside_a_piece_and_long_ones_part() -> None:
    found = plan(activity((0.9, 3), (0.0, 1.5), (0.9, 3), (0.0, 2.5), (0.9, 3)), PlanOptions())
    assert seconds(found) == near([(0.0, 7.8), (9.7, 13.0)])


def test_the_longest_pause_of_the_second_half_is_the_cut() -> None:
    speech = activity((0.9, 10), (0.0, 1.8), (0.9, 6), (0.0, 1.2), (0.9, 7), (0.0, 0.4), (0.9, 20))
    assert seconds(plan(speech, PlanOptions())) == near([(0.0, 18.1), (18.7, 46.4)])


def test_an_early_pause_is_better_than_a_cut_in_speech() -> None:
    found = plan(activity((0.9, 5), (0.0, 0.4), (0.9, 28)), PlanOptions())
    assert seconds(found) == near([(0.0, 5.2), (5.2, 33.4)])


def test_speech_without_a_pause_is_cut_where_it_is_quietest() -> None:
    speech = activity((0.9, 50))
    quiet = round(27 / WINDOW_SECONDS)
    speech.level[quiet : quiet + 3] = [0.03, 0.01, 0.02]
    speech.level[round(20 / WINDOW_SECONDS)] = 0.0
    assert plan(speech, PlanOptions()) == [Span(0, quiet + 1), Span(quiet + 1, len(speech.level))]


def test_a_weak_end_belongs_to_the_speech_and_a_weak_beginning_does_not() -> None:
    found = plan(activity((0.0, 3), (0.4, 1), (0.9, 1), (0.4, 1), (0.0, 3)), PlanOptions())
    assert seconds(found) == near([(3.7, 6.3)])


def test_a_click_is_nothing_and_loud_sound_is_speech_whatever_the_detector_says() -> None:
    assert plan(activity((0.0, 3), (1.0, 0.064), (0.0, 3)), PlanOptions()) == []
    missed = activity((0.0, 10))
    missed.excess[100:200] = 25.0
    assert plan(missed, PlanOptions()) == [Span(100 - PADDING, 200 + PADDING)]
    assert plan(activity((0.0, 10), excess=12.0), PlanOptions()) == []


def test_pieces_come_out_as_soon_as_they_are_decided() -> None:
    cutter = CutPlan(PlanOptions())
    assert cutter.feed(activity((0.9, 10), (0.0, 1.9))) == []
    assert len(cutter.feed(activity((0.0, 0.4)))) == 1
    cutter.feed(activity((0.0, 3600)))
    assert 0 <= round(3612.3 / WINDOW_SECONDS) - cutter.keep <= PADDING + 10


@pytest.mark.parametrize("longest", [0.9, 0.0, -3.0, float("nan"), float("inf")])
def test_bad_limits(longest: float) -> None:
    with pytest.raises(OptionError):
        PlanOptions(longest=longest)


scenes = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.4, 0.7, 1.0]), st.one_of(st.floats(0.03, 3), st.floats(3, 40))),
    min_size=1,
    max_size=6,
)


def scene(runs: list[tuple[float, float]], seed: int) -> Activity:
    made = activity(*runs)
    rng = np.random.default_rng(seed)
    made.level[:] = rng.uniform(0, 0.1, made.level.size)
    made.excess[:] = np.where(rng.uniform(size=made.level.size) < 0.01, 30.0, 0.0)
    return made


@settings(max_examples=50, deadline=None, derandomize=True)
@given(runs=scenes, seed=st.integers(0, 99), longest=st.sampled_from([1.0, 3.7, 12.0, 30.0]))
def test_all_speech_is_covered_in_order_and_within_the_limit(
    runs: list[tuple[float, float]], seed: int, longest: float
) -> None:
    made = scene(runs, seed)
    found = plan(made, PlanOptions(longest=longest))
    covered = np.zeros(made.level.size, bool)
    for piece in found:
        assert 0 <= piece.start < piece.end <= made.level.size
        assert (piece.end - piece.start) * WINDOW_SECONDS <= longest
        covered[piece.start : piece.end] = True
    assert all(before.end <= after.start for before, after in pairwise(found))
    speech = (made.probability >= 0.5) | (made.excess >= 20)
    for start, end in runs_of(speech):
        if end - start >= MIN_SPEECH:
            assert covered[start:end].all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(runs=scenes, seed=st.integers(0, 99))
def test_no_piece_is_without_speech_and_silence_is_not_covered(runs: list[tuple[float, float]], seed: int) -> None:
    made = scene(runs, seed)
    heard = (made.probability >= 0.35) | (made.excess >= 20)
    found = plan(made, PlanOptions())
    assert all(heard[piece.start : piece.end].any() for piece in found)
    covered = sum(piece.end - piece.start for piece in found)
    silence = sum(end - start - 2 * PADDING for start, end in runs_of(made.probability < 0.35) if end - start > 70)
    loud = int(np.count_nonzero(made.excess >= 20))
    assert covered <= made.level.size - silence + loud * 70


@settings(max_examples=30, deadline=None, derandomize=True)
@given(runs=scenes, seed=st.integers(0, 99), block=st.integers(1, 400))
def test_the_size_of_blocks_makes_no_difference_and_what_is_needed_is_kept(
    runs: list[tuple[float, float]], seed: int, block: int
) -> None:
    made = scene(runs, seed)
    cutter, found, kept = CutPlan(PlanOptions()), [], 0
    for at in range(0, made.level.size, block):
        part = slice(at, at + block)
        for piece in cutter.feed(Activity(made.probability[part], made.level[part], made.excess[part])):
            assert piece.start >= kept
            found.append(piece)
        assert cutter.keep >= kept
        kept = cutter.keep
    rest = cutter.finish()
    assert all(piece.start >= kept for piece in rest)
    assert found + rest == plan(made, PlanOptions())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    runs=st.lists(st.tuples(st.sampled_from([0.1, 0.9]), st.floats(0.3, 40)), min_size=1, max_size=7),
    seed=st.integers(0, 99),
)
def test_small_noise_does_not_move_a_cut(runs: list[tuple[float, float]], seed: int) -> None:
    clean = activity(*runs)
    for count, dip in enumerate(range(1, clean.level.size - 1, 70)):
        clean.level[dip - 1 : dip + 2] = np.array([0.04, 0.02, 0.05]) * (1 + 0.2 * (count % 3))
    rng = np.random.default_rng(seed)
    noisy = Activity(
        clean.probability + rng.uniform(-0.1, 0.1, clean.level.size),
        clean.level * rng.uniform(0.98, 1.02, clean.level.size),
        clean.excess + rng.uniform(0, 3, clean.level.size),
    )
    assert plan(noisy, PlanOptions()) == plan(clean, PlanOptions())
