"""A lock that is taken in the order in which it is asked for."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A context manager, as `threading.Lock` is one; not to be nested.

    That one is often taken again by the thread that has just let it go: a long file would keep a short one waiting to
    its end. And an interrupt may come between the taking and the work, or between the work and the giving back: since
    turns are not nested, a thread that asks for a turn while it has one has lost that so, and gets it.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._holder: int | None = None
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    def __enter__(self) -> None:
        mine = threading.get_ident(), threading.Lock()
        mine[1].acquire()
        with self._guard:
            if self._holder in (None, mine[0]):
                self._holder = mine[0]
                return
            self._waiting.append(mine)
        try:
            mine[1].acquire()
        except BaseException:  # an interrupt
            self._leave(mine)
            raise

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._holder = None
            if self._waiting:
                self._holder, lock = self._waiting.popleft()
                lock.release()

    def _leave(self, mine: tuple[int, threading.Lock]) -> None:
        """Stops waiting; a turn that has come meanwhile is passed on."""
        with self._guard:
            waits = mine in self._waiting
            if waits:
                self._waiting.remove(mine)
        if not waits:
            self.__exit__()
