"""Several callers of one engine: everybody gets his own results, in turn, and nobody waits for ever."""

from __future__ import annotations

import gc
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import count
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import pytest
from clip_samples import Numbered

from quasr.engine.base import BatchQueue, ClipRequest, ClipResult, EngineInfo, EngineStats, Ticket
from quasr.errors import ModelError, ResourceError
from quasr.pipeline.feed import answers
from quasr.pipeline.shared import Client, Lender, SharedEngine
from quasr.pipeline.turns import Turns, _Place

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from types import FrameType

SICK = 13
"""A clip of so many samples fails the engine, one of twice as many is interrupted."""


class Double(BatchQueue):
    """Ends its oldest two clips in each step. The token of a clip is its number of samples. Fails if used at once by
    two."""

    def __init__(self, in_flight: int) -> None:
        super().__init__()
        self.info = EngineInfo("double", "cpu", "fp32", 0, in_flight=in_flight)
        self.stats = EngineStats()
        self.closed = False
        self.steps = 0
        self._inside = threading.Lock()

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        assert not self.closed
        assert self._inside.acquire(blocking=False), "two threads at once"
        try:
            time.sleep(0.0005)
            self.stats.generate_seconds += len(requests)
            return [self._answer(request) for request in requests]
        finally:
            self._inside.release()

    def step(self) -> list[tuple[Ticket, ClipResult]]:
        self.steps += 1
        sick = [ticket for ticket, request in self._waiting.items() if len(request.samples) in (SICK, 2 * SICK)]
        chosen = sick or sorted(self._waiting, key=lambda one: one.number)[:2]
        try:
            found = self.run([self._waiting[ticket] for ticket in chosen])
        except BaseException:
            self._waiting = {}
            raise
        for ticket in chosen:
            del self._waiting[ticket]
        return list(zip(chosen, found, strict=True))

    def close(self) -> None:
        self.closed = True

    @staticmethod
    def _answer(request: ClipRequest) -> ClipResult:
        if len(request.samples) == SICK:
            raise ModelError("thirteen")
        if len(request.samples) == 2 * SICK:
            raise KeyboardInterrupt
        return ClipResult((len(request.samples),), (-0.1,), "stop")


def numbered(first: int, count: int) -> Generator[Numbered, None, None]:
    for number in range(first, first + count):
        yield Numbered(number)


def flat(given: Iterator[tuple[Any, list[ClipResult]]]) -> Iterator[int]:
    for _, results in given:
        for result in results:
            yield result.tokens[0]


IN_FLIGHT = pytest.mark.parametrize("in_flight", [0, 6])


@IN_FLIGHT
def test_many_threads_get_their_own_results(in_flight: int) -> None:
    shared = SharedEngine(Double(in_flight))
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda k: list(flat(answers(shared.client(), numbered(1000 * k, 30), 4))), range(1, 13)))
    assert found == [list(range(1000 * k, 1000 * k + 30)) for k in range(1, 13)]
    assert not shared.owners


@IN_FLIGHT
def test_half_read_generators_of_one_thread_do_not_wait_for_each_other(in_flight: int) -> None:
    shared = SharedEngine(Double(in_flight))
    both = [flat(answers(shared.client(), numbered(first, 20), 3)) for first in (100, 200)]
    found = [[next(one) for one in both] for _ in range(10)]
    assert found == [[100 + n, 200 + n] for n in range(10)]
    assert list(both[1]) == list(range(210, 220))
    assert list(both[0]) == list(range(110, 120))


def test_a_generator_that_is_dropped_takes_its_clips_back_at_the_next_turn() -> None:
    shared = SharedEngine(Double(6))
    dropped = flat(answers(shared.client(), numbered(100, 20), 1))
    assert next(dropped) == 100
    assert shared.owners
    del dropped
    gc.collect()
    assert list(flat(answers(shared.client(), numbered(200, 3), 1))) == [200, 201, 202]
    assert not shared.owners


def test_what_fails_the_engine_is_told_to_all_whose_clips_were_lost() -> None:
    engine = Double(6)
    shared = SharedEngine(engine)
    other, idle = flat(answers(shared.client(), numbered(100, 20), 3)), shared.client()
    assert next(other) == 100
    with pytest.raises(ModelError, match="thirteen"):
        list(flat(answers(shared.client(), numbered(SICK, 1), 1)))
    with pytest.raises(ModelError, match="thirteen"):
        list(other)
    assert idle.run([Numbered(5).request])[0].tokens == (5,)
    assert list(flat(answers(shared.client(), numbered(300, 4), 2))) == [300, 301, 302, 303]


def test_another_thread_s_interrupt_is_an_error_of_one_line() -> None:
    shared = SharedEngine(Double(6))
    other = flat(answers(shared.client(), numbered(100, 20), 3))
    assert next(other) == 100
    with pytest.raises(KeyboardInterrupt):
        list(flat(answers(shared.client(), numbered(2 * SICK, 1), 1)))
    with pytest.raises(ResourceError, match="stopped together with another thread's: transcribe it again"):
        list(other)


@IN_FLIGHT
def test_a_batch_beside_the_running_clips_gets_its_own_results(in_flight: int) -> None:
    """As second tries do. A batch that fails to start leaves the running clips alone."""
    shared = SharedEngine(Double(in_flight))
    client = shared.client()
    running = flat(answers(client, numbered(100, 20), 3))
    assert next(running) == 100
    assert [one.tokens[0] for one in client.run([Numbered(n).request for n in (7, 8, 9)])] == [7, 8, 9]
    assert list(running) == list(range(101, 120))


def test_a_clip_that_is_refused_takes_its_batch_back() -> None:
    class Small(Double):
        def submit(self, request: ClipRequest, group: Any = 0) -> Ticket:
            if len(request.samples) > 50:
                raise ResourceError("too long")
            return super().submit(request, group)

    shared = SharedEngine(Small(6))
    client = shared.client()
    with pytest.raises(ResourceError, match="too long"):
        client.run([Numbered(5).request, Numbered(60).request])
    assert client.run([Numbered(4).request])[0].tokens == (4,)
    assert not shared.owners


@IN_FLIGHT
def test_each_has_the_cost_of_his_own_steps(in_flight: int) -> None:
    engine = Double(in_flight)
    shared = SharedEngine(engine)
    clients = [shared.client() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda client: list(flat(answers(client, numbered(100, 12), 3))), clients))
    assert sum(client.stats.generate_seconds for client in clients) == engine.stats.generate_seconds == 48
    if not in_flight:
        assert [client.stats.generate_seconds for client in clients] == [12] * 4


@IN_FLIGHT
def test_a_closed_engine_says_so_to_all(in_flight: int) -> None:
    engine = Double(in_flight)
    shared = SharedEngine(engine)
    running = flat(answers(shared.client(), numbered(100, 20), 3))
    assert next(running) == 100
    shared.close()
    shared.close()
    assert engine.closed
    with pytest.raises(RuntimeError, match="closed: load the model again"):
        list(running)
    with pytest.raises(RuntimeError, match="closed"):
        shared.client().run([Numbered(1).request])


def test_one_engine_is_lent_to_all_who_need_it_at_a_time() -> None:
    made: list[Double] = []

    def make() -> Double:
        time.sleep(0.01)
        made.append(Double(0))
        return made[-1]

    lender = Lender(make)
    with ThreadPoolExecutor(8) as pool:
        clients = list(pool.map(lambda _: lender(), range(8)))
    assert len(made) == 1
    for client in clients[1:]:
        client.close()
    assert not made[0].closed
    assert clients[0].run([Numbered(3).request])[0].tokens == (3,)
    clients[0].close()
    assert made[0].closed
    assert lender().run([Numbered(4).request])[0].tokens == (4,)
    assert [engine.closed for engine in made] == [True, False]


def test_an_engine_that_cannot_be_made_is_asked_for_again() -> None:
    answers_of_make = [ResourceError("no room"), None]

    def make() -> Double:
        error = answers_of_make.pop(0)
        if error:
            raise error
        return Double(0)

    lender = Lender(make)
    with pytest.raises(ResourceError, match="no room"):
        lender()
    assert isinstance(lender(), Client)


def test_turns_come_in_the_order_of_asking() -> None:
    """A plain lock is nearly always taken again by the thread that has it."""
    turns, order = Turns(), list[object]()
    threads = [threading.Thread(target=turns.run, args=(partial(order.append, number),)) for number in range(5)]

    def hold() -> None:
        for number, thread in enumerate(threads):
            thread.start()
            wait_until(lambda most=number + 2: len(turns._line) == most)

    turns.run(hold)
    turns.run(lambda: order.append("again"))
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3, 4, "again"]


def held_by_another(turns: Turns) -> tuple[threading.Event, threading.Thread]:
    """A thread that has the turn until the event is set."""
    taken, end = threading.Event(), threading.Event()

    def hold() -> None:
        taken.set()
        end.wait(10)

    thread = threading.Thread(target=turns.run, args=(hold,), daemon=True)
    thread.start()
    assert taken.wait(10), "the turn was not given back"
    return end, thread


@pytest.mark.parametrize("comes", [False, True])
def test_who_is_interrupted_while_he_waits_gives_his_turn_away(monkeypatch: pytest.MonkeyPatch, comes: bool) -> None:
    """Both before the turn has come and in the moment when it comes."""
    turns = Turns()
    end, thread = held_by_another(turns)

    class Interrupted(SimpleQueue[None]):
        def get(self) -> None:  # type: ignore[override]
            if comes:
                end.set()
                thread.join(10)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("quasr.pipeline.turns.SimpleQueue", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            turns.run(lambda: pytest.fail("it is another's turn"))
    assert len(turns._line) == (0 if comes else 1)
    end.set()
    thread.join(10)
    other, last = held_by_another(turns)
    other.set()
    last.join(10)


def test_a_turn_that_two_interrupts_have_lost_is_found_again_by_its_thread() -> None:
    turns = Turns()
    turns._wait(_Place())
    assert turns.run(lambda: "work") == "work"
    assert not turns._line


def test_a_turn_that_two_interrupts_have_given_to_nobody_is_found_by_whoever_asks() -> None:
    """Both came when the place had been left and before the next thread was woken."""
    turns, done = Turns(), []
    place = _Place()
    turns._wait(place)
    threads = [threading.Thread(target=turns.run, args=(partial(done.append, n),), daemon=True) for n in range(2)]
    threads[0].start()
    wait_until(lambda: len(turns._line) == 2)
    turns._line.remove(place)
    threads[1].start()
    for thread in threads:
        thread.join(2)
    assert done == [0, 1]
    assert not turns._line


TRACED = ("/pipeline/turns.py", "/pipeline/shared.py")


class Interrupter:
    """Raises KeyboardInterrupt in this thread before the `at`-th line, or instruction, of the turns' code."""

    def __init__(self, at: int, instructions: bool) -> None:
        self.left = at
        self.instructions = instructions

    def __enter__(self) -> None:
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, _event: str, _argument: object) -> Any:
        if not frame.f_code.co_filename.endswith(TRACED):
            return None
        frame.f_trace_opcodes = self.instructions
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self._trace


def interrupted(interrupter: Interrupter, work: Callable[[], object], others: Callable[[], object]) -> bool:
    """Whether `work` has so many places. `others` have to come to an end in another thread before the exception is
    forgotten, with all that its frames hold."""
    ended: list[object] = []
    try:
        with interrupter:
            work()
    except KeyboardInterrupt:
        thread = threading.Thread(target=lambda: ended.append(others()), daemon=True)
        thread.start()
        thread.join(10)
        assert ended, "another thread waits for ever, or failed"
        return True
    return False


def test_an_interrupt_anywhere_gives_the_turn_to_the_next_thread() -> None:
    turns = Turns()
    for at in count():
        done: list[str] = []
        early = threading.Thread(target=turns.run, args=(partial(done.append, "early"),), daemon=True)

        def work(early: threading.Thread = early) -> None:
            early.start()
            wait_until(lambda: len(turns._line) == 2)

        late = partial(turns.run, partial(done.append, "late"))
        if not interrupted(Interrupter(at, instructions=True), partial(turns.run, work), late):
            break
        if early.ident:
            early.join(10)
        assert done == ["early", "late"][early.ident is None :]
    early.join(10)
    assert at > 100
    assert not turns._line


@IN_FLIGHT
def test_an_interrupt_anywhere_in_a_call_leaves_no_other_waiting(in_flight: int) -> None:
    """Those with clips in the engine get their results, or are told that they were lost; new ones get theirs."""
    shared = SharedEngine(Double(in_flight))

    def others(client: Client, tickets: list[Ticket]) -> None:
        found: list[tuple[Ticket, ClipResult]] = []
        with suppress(ResourceError):
            while len(found) < len(tickets):
                found += client.step()
            assert sorted(result.tokens[0] for _, result in found) == [100, 101, 102]
        assert shared.client().run([Numbered(9).request])[0].tokens == (9,)

    for at in count():
        other = shared.client()
        tickets = [other.submit(Numbered(100 + n).request) for n in range(3)]
        work = partial(shared.client().run, [Numbered(7).request])
        if not interrupted(Interrupter(at, instructions=False), work, partial(others, other, tickets)):
            break
    assert at > 50


def wait_until(true: Any) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)
