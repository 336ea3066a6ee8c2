"""Reading ahead in a thread, so that the device need not wait while the host decodes audio."""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator

T = TypeVar("T")

DEPTH = 16
"""Items that are held ready: with pieces of 30 s, 30 MB of samples."""

DRAIN_SECONDS = 0.02

ROOM_SECONDS = 1.0
"""How often a thread that waits for room looks whether anybody is left to make it."""


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


class Ahead(Generic[T]):
    """Runs a generator in a thread of its own, at most `depth` items ahead. To be used as a context manager."""

    def __init__(self, items: Generator[T, None, None], depth: int = DEPTH) -> None:
        self.ended = False
        self._items = items
        self._queue: queue.Queue[T | _End] = queue.Queue(depth)
        self._stopped = threading.Event()
        # A daemon, so that a second Ctrl-C ends the program even where a download does not.
        self._thread = threading.Thread(target=self._read, name="quasr-ahead", daemon=True)

    def take(self, *, wait: bool) -> T | None:
        """The next item. None at the end (then `ended`), or where none is ready yet and `wait` is False.

        Raises what the generator raised, once the items before that are taken.
        """
        if self.ended:
            return None
        try:
            item = self._queue.get(block=wait)
        except queue.Empty:
            return None
        if not isinstance(item, _End):
            return item
        self.ended = True
        if item.error is not None:
            raise item.error
        return None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops after the item in hand, and closes the generator in its thread."""
        self._stopped.set()
        # The garbage collector may call this in that thread, which then ends by itself.
        while self._thread.is_alive() and self._thread is not threading.current_thread():
            with suppress(queue.Empty):
                self._queue.get(timeout=DRAIN_SECONDS)

    def _read(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                self._put(item)
                if self._stopped.is_set():
                    self._items.close()
        except BaseException as caught:  # whatever it was, it is raised where the items are taken
            error = caught
        self._put(_End(error))

    def _put(self, item: T | _End) -> None:
        """Waits for room as long as somebody takes items."""
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=ROOM_SECONDS)
                return
