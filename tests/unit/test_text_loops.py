"""Loops on a token stream: what is one, what real speech says that is not, and how soon one is found."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasr.text.loops import LONGEST_PATTERN, LoopDetector, copies_of_a_loop, loop_length

if TYPE_CHECKING:
    from collections.abc import Sequence


def words(text: str) -> list[int]:
    """A token for each word with the space before it, as byte-level BPE has common words."""
    return [hash(word) for word in re.findall(r"\s*\S+", text)]


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def found_at(tokens: Sequence[int]) -> int | None:
    """After how many tokens the loop is found."""
    detector, seen = LoopDetector(), list[int]()
    for token in tokens:
        seen.append(token)
        if detector.found(seen):
            return len(seen)
    return None


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (letters("a" * 20), None),
        (letters("a" * 21), 21),
        (letters("ha" * 19), None),
        (letters("ha" * 20), 40),
        (words("I think. " * 25 + "done"), 41),  # the first "I" has no space before it
    ],
)
def test_the_official_vectors_hold_for_tokens(tokens: list[int], found: int | None) -> None:
    assert found_at(tokens) == found


@pytest.mark.parametrize(
    "text",
    [
        "seven seven seven",
        "my number is oh oh seven seven seven seven seven seven nine",
        "no no no no no no no no no no",
        "ha ha ha ha ha ha ha ha ha ha ha ha ha ha ha ha ha ha",
        "one two three four five six seven eight nine ten " * 3,
        " ".join(f"{ten} {one}" for ten in ("twenty", "thirty", "forty") for one in ("one", "two", "three", "four")),
        "row row row your boat gently down the stream merrily merrily merrily merrily life is but a dream " * 3,
        "the train on platform two is late because of snow and we are very sorry for the delay " * 3,
        "bye bye bye bye bye bye see you see you see you see you",
    ],
)
def test_what_people_say_is_no_loop(text: str) -> None:
    assert found_at(words(text)) is None


@given(st.lists(st.integers(0, 5), max_size=60), st.lists(st.integers(0, 5), min_size=1, max_size=LONGEST_PATTERN))
def test_every_loop_is_found_within_a_few_dozen_tokens(start: list[int], pattern: list[int]) -> None:
    found = found_at(start + pattern * 21)
    assert found is not None
    assert found <= len(start) + copies_of_a_loop(len(pattern)) * len(pattern)
    assert copies_of_a_loop(len(pattern)) * len(pattern) <= 80


@given(st.lists(st.integers(0, 3), max_size=120))
def test_found_means_that_a_pattern_stands_there_often_enough(tokens: list[int]) -> None:
    """The reference is the definition, looked for afresh at every end."""

    def loops(end: int) -> bool:
        spans = ((length, copies_of_a_loop(length)) for length in range(1, LONGEST_PATTERN + 1))
        return any(
            end >= length * copies and tokens[end - length * copies : end] == tokens[end - length : end] * copies
            for length, copies in spans
        )

    assert found_at(tokens) == next((end for end in range(1, len(tokens) + 1) if loops(end)), None)


@given(st.integers(1, LONGEST_PATTERN), st.integers(0, 19))
def test_one_copy_is_what_remains(length: int, more: int) -> None:
    start, pattern = [-1, -2, -3], list(range(length))
    tokens = start + pattern * 21 + pattern[: more % length]
    assert tokens[: len(tokens) - loop_length(tokens)] == start + pattern


def test_thresholds_fall_with_the_length_of_the_pattern() -> None:
    assert [copies_of_a_loop(length) for length in (1, 2, 3, 4, 6, 12, 20)] == [21, 20, 16, 12, 8, 4, 4]
    assert loop_length([]) == loop_length([5]) == loop_length([1, 2, 3] * 15) == 0
