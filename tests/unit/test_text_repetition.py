from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasr.text.repetition import fix_repetition


@pytest.mark.parametrize(
    ("text", "fixed"),
    [
        ("a" * 20, "a" * 20),
        ("a" * 21, "a"),
        ("ha" * 19, "ha" * 19),
        ("ha" * 20, "ha"),
        ("I think. " * 25 + "done", "I think. done"),
        ("", ""),
        ("x" + "\n" * 21 + "y", "x\ny"),
        ("So " + "no " * 30 + "and " + "yes " * 30 + "end", "So no and yes end"),
        ("好的。" * 40, "好的。"),
        # 20 of one character are a pattern of length 1 once the string has 40 characters.
        ("a" * 20 + "bcdefghijklmnopqrstu", "abcdefghijklmnopqrstu"),
    ],
)
def test_known_vectors(text: str, fixed: str) -> None:
    assert fix_repetition(text) == fixed


def naive(text: str, threshold: int) -> str:
    """The rule, word for word, one position at a time."""
    out, at = "", 0
    while at < len(text):
        run = 1
        while text[at + run : at + run + 1] == text[at]:
            run += 1
        out += text[at] if run > threshold else text[at] * run
        at += run
    text, out, at = out, "", 0
    while at < len(text):
        copy = 1
        if len(text) - at >= 2 * threshold:
            for size in range(1, 21):
                pattern = text[at : at + size]
                if text.startswith(pattern * threshold, at):
                    out, copy = out + pattern, 0
                    while text.startswith(pattern, at):
                        at += size
                    break
        out += text[at : at + copy]
        at += copy
    return out


pieces = st.lists(st.tuples(st.text("ab ", max_size=4), st.integers(0, 8)), max_size=6)


@given(pieces, st.integers(2, 5))
def test_equals_the_rule_spelled_out(parts: list[tuple[str, int]], threshold: int) -> None:
    text = "".join(piece * times for piece, times in parts)
    assert fix_repetition(text, threshold) == naive(text, threshold)


@pytest.mark.parametrize("text", ["ha" * 50_000, ("ab" * 19 + "c") * 2_600, ("abcdefghijklmnopqrst" * 19 + "x") * 265])
def test_time_does_not_grow_with_the_square_of_the_length(text: str) -> None:
    start = time.process_time()
    fixed = fix_repetition(text)
    assert time.process_time() - start < 2.0
    assert len(fixed) in (2, len(text))
