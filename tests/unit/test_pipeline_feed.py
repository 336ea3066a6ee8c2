"""Reading ahead, and the order of results from an engine that finishes clips in any order."""

from __future__ import annotations

import gc
import random
import threading
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from clip_samples import Numbered

from quasr.audio.fetch import FetchLimits
from quasr.engine.base import BatchQueue, ClipRequest, ClipResult, EngineInfo, EngineStats, Ticket
from quasr.errors import AudioNotFoundError, ModelError
from quasr.pipeline.ahead import Ahead
from quasr.pipeline.feed import answers
from quasr.pipeline.transcribe import Setup, transcribe
from quasr.text.prompt import Prompt
from quasr.types import TranscribeOptions, Transcript

if TYPE_CHECKING:
    from collections.abc import Generator, Hashable, Sequence

    from quasr.text.tokenizer import Tokenizer


class Continuous(BatchQueue):
    """Ends a random few of its clips in each step. The text of a clip is its number of samples."""

    def __init__(self, in_flight: int = 5, seed: int = 0) -> None:
        super().__init__()
        self.info = EngineInfo("script", "cpu", "fp32", 0, in_flight=in_flight)
        self.stats = EngineStats()
        self.most = 0
        self.groups: set[Hashable] = set()
        self._random = random.Random(seed)

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        self.stats.generate_seconds += len(requests)
        return [self._answer(request) for request in requests]

    def step(self) -> list[tuple[Ticket, ClipResult]]:
        assert self._waiting, "a step without work waits for nothing"
        self.most = max(self.most, len(self._waiting))
        chosen = self._random.sample(sorted(self._waiting, key=lambda one: one.number), k=min(2, len(self._waiting)))
        self.groups.update(ticket.group for ticket in chosen)
        return [(ticket, self.run([self._waiting.pop(ticket)])[0]) for ticket in chosen]

    def close(self) -> None:
        self._waiting = {}

    @staticmethod
    def _answer(request: ClipRequest) -> ClipResult:
        if len(request.samples) == 13:
            raise ModelError("thirteen")
        text = f"language English<asr_text>{len(request.samples)}"
        return ClipResult(tuple(map(ord, text)), (-0.1,) * len(text), "stop")


def numbered(count: int, closed: list[str]) -> Generator[Numbered, None, None]:
    try:
        for number in range(1, count + 1):
            yield Numbered(number)
    finally:
        closed.append(threading.current_thread().name)


def texts(results: Sequence[ClipResult]) -> list[str]:
    return ["".join(map(chr, one.tokens)).split(">")[1] for one in results]


@pytest.mark.parametrize(("in_flight", "batch"), [(0, 3), (1, 4), (5, 1), (5, 3), (30, 4), (3, 20)])
def test_all_come_in_order_with_their_own_results(in_flight: int, batch: int) -> None:
    engine = Continuous(in_flight)
    found = [(tasks, texts(results)) for tasks, results in answers(engine, numbered(11, []), batch)]
    assert [text for _, group in found for text in group] == [str(number) for number in range(1, 12)]
    assert [len(tasks) for tasks, _ in found[:-1]] == [batch] * (len(found) - 1)
    assert all([str(task.number) for task in tasks] == group for tasks, group in found)
    assert engine.most <= in_flight
    assert len(engine.groups) <= 1


def test_nothing_to_do() -> None:
    assert list(answers(Continuous(), numbered(0, []), 4)) == []


def test_a_caller_that_leaves_ends_the_thread_and_takes_its_clips_back() -> None:
    engine, closed = Continuous(), []
    given = answers(engine, numbered(10_000, closed), 2)
    for _ in range(5):
        next(given)
    given.close()  # type: ignore[attr-defined]
    assert closed == ["quasr-ahead"]
    assert not engine._waiting
    assert "quasr-ahead" not in {thread.name for thread in threading.enumerate()}


def test_an_error_of_the_engine_ends_the_thread() -> None:
    closed: list[str] = []
    with pytest.raises(ModelError, match="thirteen"):
        list(answers(Continuous(), numbered(10_000, closed), 2))
    assert closed == ["quasr-ahead"]


def test_reading_errors_come_after_what_was_read() -> None:
    def broken() -> Generator[int, None, None]:
        yield 1
        yield 2
        raise KeyboardInterrupt

    with Ahead(broken()) as ahead:
        assert [ahead.take(wait=True), ahead.take(wait=True)] == [1, 2]
        with pytest.raises(KeyboardInterrupt):
            ahead.take(wait=True)
        assert ahead.ended
        assert ahead.take(wait=True) is None


def test_no_more_than_the_depth_is_read_ahead() -> None:
    read: list[int] = []
    asked = threading.Event()

    def items() -> Generator[int, None, None]:
        for number in range(100):
            read.append(number)
            if number == 4:
                asked.set()
            yield number

    with Ahead(items(), depth=3) as ahead:
        assert ahead.take(wait=True) == 0
        assert asked.wait(10)
        assert max(read) <= 5
    assert len(read) < 100


def test_a_caller_that_the_garbage_collector_ends_in_the_reading_thread_does_not_hold_it() -> None:
    dropped = threading.Event()
    after: list[int] = []

    def items() -> Generator[int, None, None]:
        yield 1
        dropped.wait()
        gc.collect()
        for number in range(100):
            after.append(number)
            yield number

    def caller() -> Generator[int | None, None, None]:
        with Ahead(items(), depth=2) as ahead:
            yield ahead.take(wait=True)

    given: list[object] = [caller()]
    assert next(given[0]) == 1  # type: ignore[call-overload]
    given.append(given)  # from here on nothing but the collector ends it
    thread = next(one for one in threading.enumerate() if one.name == "quasr-ahead")
    gc.disable()
    try:
        del given
        dropped.set()
        thread.join(10)
    finally:
        gc.enable()
    assert not thread.is_alive()
    assert len(after) <= 1


@pytest.mark.slow
def test_a_call_of_many_files_gives_the_same_as_batch_by_batch() -> None:
    """Files of one piece and of several, one that is not there, and one that is silence."""

    class Characters:
        def decode(self, ids: Sequence[int]) -> str:
            return "".join(map(chr, ids))

    rng = np.random.default_rng(0)
    sources: list[object] = [
        (rng.normal(0, 0.1, round(seconds * 16_000)).astype(np.float32), 16_000) for seconds in (2, 11, 1, 7, 1)
    ]
    sources.insert(3, "no such file.wav")
    options = TranscribeOptions(piece_seconds=5.0, batch_size=3, guards=False)
    setup = Setup(cast("Tokenizer", Characters()), Prompt((1, 2), (3,)), None, options, FetchLimits())

    def run(in_flight: int, seed: int) -> list[object]:
        done: list[float] = []
        engine = Continuous(in_flight, seed)
        found = list(transcribe(engine, setup, sources, done.append))  # type: ignore[arg-type]
        spent = sum(one.timings.generate for one in found if isinstance(one, Transcript))
        assert spent == pytest.approx(engine.stats.generate_seconds)
        assert done == sorted(done)
        texts = [one.text if isinstance(one, Transcript) else type(one) for one in found]
        return [*texts, done[-1]]

    plain = run(0, 0)
    assert plain[3] is AudioNotFoundError
    assert len(plain) == 7
    for seed in range(2):
        assert run(4, seed) == plain
