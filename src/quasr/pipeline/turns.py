"""Threads that work one at a time, in the order in which they ask."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class _Place:
    """A thread's place in the line; something is put into `wake` when it is the first there."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.wake: SimpleQueue[None] = SimpleQueue()


class Turns:
    """Not to be nested. A plain lock would often be taken again by the thread that has just let it go: a long file
    would keep a short one waiting to its end.

    An interrupt may come anywhere and must not leave a turn with a thread that does nothing with it. So there is no
    lock that could stay locked: the line changes by single calls into C, and the thread that is first in it has the
    turn. A turn is no context manager, because an interrupt may come between `__enter__` and the work.
    """

    def __init__(self) -> None:
        self._line: deque[_Place] = deque()

    def run(self, work: Callable[[], T]) -> T:
        """What `work()` returns or raises, called when it is this thread's turn, which ends with it."""
        place = _Place()
        try:
            try:
                self._wait(place)
                return work()
            finally:
                self._leave(place)
        finally:
            # An interrupt may have cut the first one short.
            self._leave(place)

    def _wait(self, place: _Place) -> None:
        # Turns are not nested: a place that this thread still has was lost to two interrupts in a row.
        for lost in [other for other in tuple(self._line) if other.thread == place.thread]:
            self._leave(lost)
        # And whoever is first now may have lost his waking so.
        self._wake_first()
        self._line.append(place)
        while self._line[0] is not place:
            place.wake.get()

    def _leave(self, place: _Place) -> None:
        """Leaves the line, wherever in it, and wakes the first of the others. A second time does no harm."""
        if place in self._line:
            self._line.remove(place)
        self._wake_first()

    def _wake_first(self) -> None:
        with suppress(IndexError):
            self._line[0].wake.put(None)
