"""What goes to standard error: notes, and a progress line where a person is watching."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ERASE_LINE = "\r\x1b[2K"


def note(message: str) -> None:
    """One line on standard error."""
    print(message, file=sys.stderr, flush=True)  # noqa: T201


def result(text: str) -> None:
    """Text on standard output, ended by a line end, and at once: the next program may be waiting for it."""
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    sys.stdout.flush()


class ProgressLine:
    """A line on standard error that is rewritten after every batch; silent where that is no terminal."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._shown = sys.stderr.isatty()

    def __call__(self, seconds: float) -> None:
        """Shows that `seconds` of audio are done."""
        if self._shown:
            speed = seconds / max(time.perf_counter() - self._started, 1e-9)
            sys.stderr.write(f"{ERASE_LINE}{seconds:.0f} s of audio done, {speed:.1f} times real time")
            sys.stderr.flush()

    def clear(self) -> None:
        """Takes the line away, before something else is printed."""
        if self._shown:
            sys.stderr.write(ERASE_LINE)
            sys.stderr.flush()


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def megabytes(size: int) -> str:
    """Bytes as decimal megabytes: 1500000 is "1.5 MB"."""
    return f"{size / 1e6:.1f} MB" if size < 1e7 else f"{size / 1e6:,.0f} MB"
