"""Collapses the loops that a speech model falls into. Rule and threshold of the official `qwen-asr` package."""

from __future__ import annotations

import re

MAX_PATTERN = 20
"""Longest repeated pattern that is looked for, in characters."""


def fix_repetition(text: str, threshold: int = 20) -> str:
    """One copy instead of a loop: `"ha" * 20` becomes `ha`, `"ha" * 19` stays.

    First a run of more than `threshold` equal characters becomes one. Then, where at least `2 * threshold` characters
    remain, the shortest pattern of 1 to 20 characters that stands there `threshold` or more times becomes one copy.
    The regular expressions cannot backtrack past one pattern, so the time grows with the length, not its square.
    """
    text = re.sub(rf"(.)\1{{{threshold},}}", r"\1", text, flags=re.DOTALL)
    pattern = rf"(?=.{{{2 * threshold}}})(.{{1,{MAX_PATTERN}}}?)\1{{{threshold - 1},}}"
    return re.sub(pattern, r"\1", text, flags=re.DOTALL)
