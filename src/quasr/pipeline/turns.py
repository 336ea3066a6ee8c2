"""A lock that is taken in the order in which it is asked for."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A context manager, as `threading.Lock` is one.

    That one is often taken again by the thread that has just let it go: a long file would keep a short one waiting to
    its end.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        try:
            mine.acquire()
        except BaseException:  # an interrupt
            self._leave(mine)
            raise

    def __exit__(self, *_: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False

    def _leave(self, mine: threading.Lock) -> None:
        """Stops waiting; a turn that has come meanwhile is passed on."""
        with self._guard:
            waits = mine in self._waiting
            if waits:
                self._waiting.remove(mine)
        if not waits:
            self.__exit__()
