from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasr.output.timestamps import clock, milliseconds


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "00:00:00,000"),
        (-0.5, "00:00:00,000"),
        (1.2345, "00:00:01,234"),
        (59.9996, "00:01:00,000"),
        (3599.9999, "01:00:00,000"),
        (3661.5, "01:01:01,500"),
        (360_000.0, "100:00:00,000"),
    ],
)
def test_clock_of_known_times(seconds: float, shown: str) -> None:
    assert clock(seconds, ",") == shown
    assert clock(seconds, ".") == shown.replace(",", ".")


@given(st.integers(0, 10**9))
def test_clock_keeps_every_millisecond(ms: int) -> None:
    assert milliseconds(ms / 1000) == ms
    hours, minutes, seconds = clock(ms / 1000, ".").split(":")
    assert round((int(hours) * 3600 + int(minutes) * 60 + float(seconds)) * 1000) == ms
