"""Clips into an engine and results out of it, in order."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from quasr.pipeline.ahead import Ahead

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from quasr.engine.base import ClipRequest, ClipResult, Engine, Ticket


class Asked(Protocol):
    """What has a request for an engine."""

    @property
    def request(self) -> ClipRequest: ...


T = TypeVar("T", bound=Asked)


def answers(
    engine: Engine, tasks: Generator[T, None, None], batch: int
) -> Iterator[tuple[tuple[T, ...], list[ClipResult]]]:
    """`batch` tasks at a time (fewer at the end), in order, with their results.

    An engine that takes many clips at once (`EngineInfo.in_flight`) has later ones already by then, and `tasks` are
    read in another thread. Any other engine gets one batch after the other, and `tasks` are read between them.
    """
    if not engine.info.in_flight:
        while found := tuple(islice(tasks, batch)):
            yield found, engine.run([task.request for task in found])
        return
    with Ahead(tasks) as ahead:
        feed = _Feed(engine, ahead, batch)
        try:
            while feed.gather():
                yield feed.take()
        finally:
            feed.stop()


class _Feed(Generic[T]):
    """Tasks that were submitted and not yet given on, in order."""

    def __init__(self, engine: Engine, ahead: Ahead[T], batch: int) -> None:
        self._engine = engine
        self._ahead = ahead
        self._batch = batch
        self._group = object()
        self._pending: deque[tuple[T, Ticket]] = deque()
        self._results: dict[Ticket, ClipResult] = {}

    def gather(self) -> bool:
        """Works until the next batch is finished; False where nothing is left."""
        self._submit()
        while not self._ready():
            self._results.update((ticket, result) for ticket, result in self._engine.step())
            self._submit()
        return bool(self._pending)

    def take(self) -> tuple[tuple[T, ...], list[ClipResult]]:
        """The next batch, which is finished."""
        found = [self._pending.popleft() for _ in range(min(self._batch, len(self._pending)))]
        return tuple(task for task, _ in found), [self._results.pop(ticket) for _, ticket in found]

    def stop(self) -> None:
        """Takes back what nobody waits for any more."""
        self._engine.cancel(self._group)

    def _ready(self) -> bool:
        whole = len(self._pending) >= self._batch or self._ahead.ended
        return whole and all(ticket in self._results for _, ticket in islice(self._pending, self._batch))

    def _submit(self) -> None:
        """Fills the engine with what is read. It waits for reading only where the engine has nothing to do.

        Results that wait for an earlier clip count too, so that one slow clip cannot make them pile up.
        """
        most = self._engine.info.in_flight
        room = max(2 * most, self._batch)
        while (running := len(self._pending) - len(self._results)) < most and len(self._pending) < room:
            task = self._ahead.take(wait=not running)
            if task is None:
                return
            self._pending.append((task, self._engine.submit(task.request, self._group)))
