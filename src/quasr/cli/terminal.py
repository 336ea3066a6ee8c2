"""What goes to standard error: notes, and a progress line where a person is watching."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, TextIO

from quasr.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Sequence

ERASE_LINE = "\r\x1b[2K"
BAR_COLUMNS = 24


def note(message: str) -> None:
    """One line on standard error, whatever is in the names of files. Where that cannot be written it is not seen."""
    try:
        print("".join(char if char.isprintable() else "?" for char in message), file=sys.stderr, flush=True)  # noqa: T201
    except OSError:
        _abandon(sys.stderr)


def result(text: str) -> None:
    """Text on standard output, ended by a line end, and at once: the next program may be waiting for it.

    Raises ResourceError where it cannot be written, and BrokenPipeError where nobody reads it any more.
    """
    try:
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise refused_stdout(error) from error


def refused_stdout(error: OSError) -> ResourceError:
    """What to say where standard output cannot be written. What is buffered is given up."""
    abandon_stdout()
    return ResourceError(f"standard output cannot be written ({error.strerror}): send it elsewhere")


def open_closed_streams() -> None:
    """Stands in for what the shell has closed (`>&-`): nothing to read, nowhere to write transcripts, notes unseen.

    Otherwise the next file that is opened would get the stream's number, and whatever is written there.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        # For reading: what is written there must fail, not vanish.
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def abandon_stdout() -> None:
    """What is still buffered goes nowhere, and does not fail once more at exit."""
    _abandon(sys.stdout)


def _abandon(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class ProgressLine:
    """A line on standard error that is rewritten after every batch; silent where that is no terminal.

    With `total`, the seconds of audio that there are, it shows a bar and the time that is left.
    """

    def __init__(self, total: float | None = None) -> None:
        self._started = time.perf_counter()
        self._shown = sys.stderr.isatty()
        self._total = total
        self._done = 0.0

    @property
    def shown(self) -> bool:
        """Whether anybody sees it, so that a total is worth finding out."""
        return self._shown

    def expect(self, total: float | None) -> None:
        """Sets the total, and starts the clock."""
        self._total, self._started = total, time.perf_counter()

    def __call__(self, seconds: float) -> None:
        """Shows that `seconds` of audio are done. Never goes back: silence that is not decoded counts late."""
        self._done = max(self._done, seconds)
        if self._shown:
            # One column is left free: a full line would wrap on some terminals, and then stay.
            width = shutil.get_terminal_size().columns - 1
            line = progress_text(self._done, self._total, time.perf_counter() - self._started)
            self._write(f"{ERASE_LINE}{line[:width]}")

    def clear(self) -> None:
        """Takes the line away, before something else is printed."""
        if self._shown:
            self._write(ERASE_LINE)

    def _write(self, text: str) -> None:
        """A terminal that has gone away stops nothing."""
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            self._shown = False
            _abandon(sys.stderr)


def progress_text(done: float, total: float | None, elapsed: float) -> str:
    """How far it is: seconds of audio `done` of `total`, after `elapsed` seconds."""
    speed = done / max(elapsed, 1e-9)
    if not total:
        return f"{done:.0f} s of audio done, {speed:.1f} s a second"
    part = min(done / total, 1.0)
    full = round(part * BAR_COLUMNS)
    left = duration(max(total - done, 0.0) / speed) if speed else "?"
    bar = "#" * full + "-" * (BAR_COLUMNS - full)
    return f"[{bar}] {part:4.0%}  {done:.0f} of {total:.0f} s of audio, {speed:.1f} s a second, {left} left"


def duration(seconds: float) -> str:
    """Seconds as `m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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
