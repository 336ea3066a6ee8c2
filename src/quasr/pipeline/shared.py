"""One engine for several threads, and for several half-read generators of one thread: they take turns, step by step.

Each call is a client of its own and gets the results of its own clips, whoever made the step that finished them. A turn
is one step, and never lasts while a caller looks at his results, so nobody can keep it.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

from quasr.engine.base import EngineStats, belongs, run_group
from quasr.errors import QuasrError, ResourceError
from quasr.pipeline.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from quasr.engine.base import ClipRequest, ClipResult, Engine, EngineInfo, Ticket

T = TypeVar("T")

CLOSED = "the transcriber is closed: load the model again"


class SharedEngine:
    """An engine with its lock, and whose clips are whose."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.owners: dict[Ticket, Client] = {}
        self.closed = False
        self._turns = Turns()
        self._cancelled: deque[tuple[Client, Hashable]] = deque()

    def client(self, on_close: Callable[[], None] = lambda: None) -> Client:
        """A new caller's view of the engine; `on_close` is called when he closes it."""
        return Client(self, on_close)

    def cancel(self, client: Client, what: Hashable) -> None:
        """As `Engine.cancel`, but at the next turn: the garbage collector may end a caller in the midst of a step."""
        self._cancelled.append((client, what))

    def close(self) -> None:
        """Closes the engine; callers who still wait get a RuntimeError."""
        self._turns.run(self._close)

    def turn(self, work: Callable[[Engine], T]) -> T:
        """What `work(engine)` returns, which has the engine for itself. Raises RuntimeError where it is closed."""
        return self._turns.run(lambda: work(self._open()))

    def fail(self, error: BaseException) -> None:
        """All clips are lost, by an engine that raises `error`: their owners are told at their next turn."""
        for owner in set(self.owners.values()):
            owner.error = error
        self.owners.clear()

    def _open(self) -> Engine:
        """The engine, rid of what was cancelled."""
        if self.closed:
            raise RuntimeError(CLOSED)
        while self._cancelled:
            self._forget(*self._cancelled[0])
            self._cancelled.popleft()
        return self.engine

    def _close(self) -> None:
        self.closed = True
        self.fail(RuntimeError(CLOSED))
        self.engine.close()

    def _forget(self, client: Client, what: Hashable) -> None:
        self.engine.cancel(what)
        client.ready = [one for one in client.ready if not belongs(one[0], what)]
        self.owners = {ticket: owner for ticket, owner in self.owners.items() if not belongs(ticket, what)}


class Client:
    """The engine as one call sees it. `stats` are of the steps that it made itself.

    `ready` and `error` are what others' steps brought for it; they are touched in turns only.
    """

    def __init__(self, shared: SharedEngine, on_close: Callable[[], None]) -> None:
        self.stats = EngineStats()
        self.error: BaseException | None = None
        self.ready: list[tuple[Ticket, ClipResult]] = []
        self._shared = shared
        self._on_close = on_close

    @property
    def info(self) -> EngineInfo:
        """As `Engine.info`."""
        return self._shared.engine.info

    def submit(self, request: ClipRequest, group: Hashable = 0) -> Ticket:
        """As `Engine.submit`."""

        def work(engine: Engine) -> Ticket:
            ticket = engine.submit(request, group)
            self._shared.owners[ticket] = self
            return ticket

        return self._turn(work)

    def step(self) -> list[tuple[Ticket, ClipResult]]:
        """As `Engine.step`. Raises what another caller's step raised, too, if that ended the work on these clips."""
        return self._turn(self._step)

    def cancel(self, what: Hashable) -> None:
        """As `Engine.cancel`."""
        self._shared.cancel(self, what)

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        """As `Engine.run`. An engine that takes many clips at once goes on with the others' meanwhile."""
        if not self.info.in_flight:
            return self._turn(lambda engine: engine.run(requests))
        results, others = run_group(self, requests)
        self.ready += others
        return results

    def close(self) -> None:
        """Ends this view; what lies behind it stays as long as others need it."""
        self._on_close()

    def _turn(self, work: Callable[[Engine], T]) -> T:
        return self._shared.turn(lambda engine: self._counted(engine, work))

    def _counted(self, engine: Engine, work: Callable[[Engine], T]) -> T:
        """`work(engine)`, whose cost is added to `stats`. Raises what ended this client's clips meanwhile."""
        if self.error is not None:
            error, self.error = self.error, None
            raise _anew(error) from error
        before = _figures(engine.stats)
        try:
            return work(engine)
        finally:
            for name, value in _figures(engine.stats).items():
                setattr(self.stats, name, getattr(self.stats, name) + value - before[name])

    def _step(self, engine: Engine) -> list[tuple[Ticket, ClipResult]]:
        if not self.ready:
            try:
                self._deliver(engine.step())
            except BaseException as error:
                self._shared.fail(error)
                self.error = None
                raise
        found, self.ready = self.ready, []
        return found

    def _deliver(self, finished: list[tuple[Ticket, ClipResult]]) -> None:
        """Gives each result to its owner, who is forgotten only then: an interrupt in between is told to him."""
        owners = self._shared.owners
        for ticket, result in finished:
            if ticket in owners:
                owners[ticket].ready.append((ticket, result))
                del owners[ticket]


class Lender:
    """Makes an engine for the first who needs one, lends it to all who do meanwhile, and closes it behind the last."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._lock = threading.RLock()  # the garbage collector may give one back while another is lent
        self._shared: SharedEngine | None = None
        self._users = 0

    def __call__(self) -> Client:
        """Raises what `make` raises."""
        with self._lock:
            if self._shared is None:
                self._shared = SharedEngine(self._make())
            self._users += 1
            return self._shared.client(self._give_back)

    def _give_back(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users and self._shared is not None:
                self._shared.close()
                self._shared = None


def _figures(stats: EngineStats) -> dict[str, float]:
    return {field.name: getattr(stats, field.name) for field in fields(stats)}


def _anew(error: BaseException) -> Exception:
    """The error for another thread than that which met it. An interrupt is that thread's own."""
    if isinstance(error, QuasrError):
        return type(error)(*error.args)
    if isinstance(error, Exception):
        return RuntimeError(str(error))
    return ResourceError("decoding was stopped together with another thread's: transcribe it again")
