"""Seconds as milliseconds and as the clock of subtitle files."""

from __future__ import annotations


def milliseconds(seconds: float) -> int:
    """Nearest whole millisecond, never below 0."""
    return max(0, round(seconds * 1000))


def clock(seconds: float, decimal: str) -> str:
    """`HH:MM:SS` and three digits after `decimal`: "," for SRT, "." for WebVTT. More hours take more digits."""
    whole, ms = divmod(milliseconds(seconds), 1000)
    minutes, secs = divmod(whole, 60)
    hours, mins = divmod(minutes, 60)
    return f"{hours:02d}:{mins:02d}:{secs:02d}{decimal}{ms:03d}"
