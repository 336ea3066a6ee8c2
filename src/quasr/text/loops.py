"""Loops in a stream of tokens: found while they are decoded, so that they cost a few dozen tokens and not the budget.

A loop is a pattern of 1 to 20 tokens that stands there `copies_of_a_loop(length)` times in a row. `text.repetition`
does the same for characters when all is decoded; this is the earlier net, and it never stops what that one keeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST_PATTERN = 20
MOST_COPIES = 20
LEAST_COPIES = 4
LOOP_TOKENS = 48
"""About 15 s of speech with the large vocabulary, 5 s with the demo's: nobody says one thing over and over so long."""


def copies_of_a_loop(length: int) -> int:
    """How often a pattern of `length` tokens must stand in a row to be a loop, from 21 for one token down to 4.

    20 copies are the official package's threshold (a run of one character needs 21). Patterns of 3 tokens and more
    need fewer, so that a loop is 42 to 80 tokens long; four times the same sentence of 20 tokens is a loop, three
    times is not.
    """
    if length == 1:
        return MOST_COPIES + 1
    return min(MOST_COPIES, max(LEAST_COPIES, -(-LOOP_TOKENS // length)))


_NEEDED = (0, *((copies_of_a_loop(length) - 1) * length for length in range(1, LONGEST_PATTERN + 1)))
"""For each length of a pattern, how many tokens must equal the one that stands `length` before them."""


class LoopDetector:
    """Watches one growing list of tokens; at most 20 comparisons a token, 1 to 3 microseconds."""

    def __init__(self) -> None:
        self._runs = [0] * (LONGEST_PATTERN + 1)

    def found(self, tokens: Sequence[int]) -> bool:
        """Whether `tokens` ends in a loop. To be called after each token that is appended."""
        last, before = tokens[-1], tokens[-2 : -2 - LONGEST_PATTERN : -1]
        if last not in before:
            self._runs = [0] * (LONGEST_PATTERN + 1)
            return False
        return self._count(last, before)

    def _count(self, last: int, before: Sequence[int]) -> bool:
        runs, found = self._runs, False
        for length, earlier in enumerate(before, start=1):
            if earlier != last:
                runs[length] = 0
                continue
            runs[length] += 1
            found = found or runs[length] >= _NEEDED[length]
        return found


def loop_length(tokens: Sequence[int]) -> int:
    """How many tokens at the end of `tokens` only repeat what stands before them; 0 where it does not end in a loop."""
    for length in range(1, LONGEST_PATTERN + 1):
        run = _repeated(tokens, length)
        if run >= _NEEDED[length]:
            return run
    return 0


def _repeated(tokens: Sequence[int], length: int) -> int:
    run = 0
    while run + length < len(tokens) and tokens[-1 - run] == tokens[-1 - run - length]:
        run += 1
    return run
