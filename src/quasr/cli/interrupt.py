"""Ctrl-C at a place where nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import FrameType

HINT = b"\nstopping after what is being decoded; Ctrl-C again stops at once\n"


class Interrupt:
    """While it is entered, the first Ctrl-C only asks to stop, and the second raises KeyboardInterrupt.

    An exception that a signal raises may come inside a callback of FFmpeg's, which swallows it and takes the file for
    damaged: a transcript would be cut short and look complete. `rest` is called where stopping loses nothing, `batch`
    after each batch, whose results are still to be looked at.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._batches = 0
        # An ignored signal, as under nohup, stays ignored; and only the main thread may change what a signal does.
        self._ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )

    def __enter__(self) -> Self:
        if self._ours:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def rest(self) -> None:
        """Raises KeyboardInterrupt if it was asked for."""
        if self._asked:
            raise KeyboardInterrupt

    def batch(self) -> None:
        """Raises KeyboardInterrupt at the second batch since it was asked for: the first one's results are out."""
        self._batches += bool(self._asked)
        if self._batches > 1:
            raise KeyboardInterrupt

    def result(self) -> None:
        """Raises KeyboardInterrupt if it was asked for twice: the second may have cut this very result short."""
        if self._asked > 1:
            raise KeyboardInterrupt

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        self._asked += 1
        if self._asked > 1:
            raise KeyboardInterrupt
        # Not print: the signal may have come in the midst of one.
        os.write(2, HINT)
