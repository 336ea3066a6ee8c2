"""Submitting to an engine that has only batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from quasr.engine.base import BatchQueue, ClipRequest, ClipResult, memory_error

if TYPE_CHECKING:
    from collections.abc import Sequence


class Echo(BatchQueue):
    """Answers with the prefix; keeps the size of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        self.batches.append(len(requests))
        if any(not request.prefix for request in requests):
            raise RuntimeError("no prefix")
        return [ClipResult(request.prefix, (), "stop") for request in requests]


def request(*prefix: int) -> ClipRequest:
    return ClipRequest(np.zeros(16_000, np.float32), prefix, (), 5)


def test_a_step_runs_all_that_waits_as_one_batch() -> None:
    engine = Echo()
    tickets = [engine.submit(request(number), group="file") for number in (7, 8, 7)]
    assert len(set(tickets)) == 3
    assert {ticket: result.tokens for ticket, result in engine.step()} == dict(
        zip(tickets, [(7,), (8,), (7,)], strict=True)
    )
    assert engine.batches == [3]
    assert engine.step() == []


def test_a_ticket_or_a_group_can_be_cancelled() -> None:
    engine = Echo()
    first, second = engine.submit(request(1), "a"), engine.submit(request(2), "a")
    engine.submit(request(3), "b")
    engine.cancel(first)
    engine.cancel("b")
    engine.cancel("nobody")
    assert [ticket for ticket, _ in engine.step()] == [second]


def test_a_batch_that_fails_is_not_tried_again() -> None:
    engine = Echo()
    engine.submit(request())
    with pytest.raises(RuntimeError, match="no prefix"):
        engine.step()
    assert engine.step() == []


def test_the_advice_names_the_clips() -> None:
    assert "2 clips of up to 1 s" in str(memory_error("cuda:0", [request(1), request(2)]))
