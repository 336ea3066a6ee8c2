"""The scheduler under a simulated clock: what it promises, and what its order of clips is worth."""

from __future__ import annotations

import random
import statistics
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quasr.engine.base import token_budget
from quasr.engine.scheduler import PATIENCE, RATE, Admission, CachePool, Scheduler, Ticket
from quasr.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

STEPS = 8
"""Decode steps between two looks at the queue, as an engine's thread does them."""


class Policy(Protocol):
    """What the simulator drives: the scheduler, or another order to compare it with."""

    def submit(self, ticket: Ticket, now: float) -> None: ...
    def admit(self, now: float) -> list[Admission]: ...
    def finish(self, ticket: Ticket) -> None: ...


@dataclass(frozen=True)
class Arrival:
    """A clip that comes `at` some second and makes `tokens` tokens before it stops."""

    at: float
    ticket: Ticket
    tokens: int


@dataclass
class Run:
    """What happened: seconds of each clip's start and end, and how many clips ran at once."""

    started: dict[Ticket, float] = field(default_factory=dict)
    ended: dict[Ticket, float] = field(default_factory=dict)
    widest: int = 0

    @property
    def makespan(self) -> float:
        return max(self.ended.values())


def prefill_seconds(positions: int) -> float:
    """A launch, and 100,000 positions a second."""
    return 0.005 + positions / 100_000 if positions else 0.0


def step_seconds(rows: int) -> float:
    """Reading the weights, and 40 us a row beside it: 0.84 ms for one row, 3.4 for 64."""
    return 0.0008 + 0.00004 * rows


def simulate(policy: Policy, arrivals: Sequence[Arrival]) -> Run:
    """An engine's loop on a clock of its own. Raises AssertionError where nothing runs and clips still wait."""
    coming, left, run, now = deque(sorted(arrivals, key=lambda one: one.at)), {}, Run(), 0.0
    needed = {one.ticket: one.tokens for one in arrivals}
    regions = Regions()
    while len(run.ended) < len(arrivals):
        while coming and coming[0].at <= now:
            policy.submit(coming[0].ticket, coming.popleft().at)
        admitted = policy.admit(now)
        regions.add(admitted)
        run.started |= dict.fromkeys((one.ticket for one in admitted), now)
        left |= {one.ticket: needed[one.ticket] for one in admitted}
        run.widest = max(run.widest, len(left))
        if not left:
            assert coming, "clips wait, nothing runs and nothing comes"
            now = coming[0].at
            continue
        now += prefill_seconds(sum(one.ticket.prompt for one in admitted)) + STEPS * step_seconds(len(left))
        left = {ticket: tokens - STEPS for ticket, tokens in left.items()}
        for ticket in [ticket for ticket, tokens in left.items() if tokens <= 0]:
            del left[ticket]
            policy.finish(ticket)
            regions.remove(ticket)
            run.ended[ticket] = now
    return run


class Regions:
    """Checks that no two running clips share a row or a cache position."""

    def __init__(self) -> None:
        self.running: dict[Ticket, Admission] = {}

    def add(self, admitted: Sequence[Admission]) -> None:
        self.running |= {one.ticket: one for one in admitted}
        rows = [one.row for one in self.running.values()]
        assert len(set(rows)) == len(rows)
        spans = sorted((one.offset, one.offset + one.ticket.positions) for one in self.running.values())
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))

    def remove(self, ticket: Ticket) -> None:
        del self.running[ticket]


class FirstCome:
    """The plainest policy: in the order of arrival, and nothing passes the first."""

    def __init__(self, positions: int, rows: int) -> None:
        self.pool, self.rows = CachePool(positions), list(range(rows))
        self.queue: deque[Ticket] = deque()
        self.running: dict[Ticket, Admission] = {}

    def submit(self, ticket: Ticket, now: float) -> None:
        self.queue.append(ticket)

    def admit(self, now: float) -> list[Admission]:
        found = []
        while self.queue and self.rows and (offset := self.pool.take(self.queue[0].positions)) is not None:
            found.append(Admission(self.queue.popleft(), self.rows.pop(), offset))
        self.running |= {one.ticket: one for one in found}
        return found

    def finish(self, ticket: Ticket) -> None:
        gone = self.running.pop(ticket)
        self.rows.append(gone.row)
        self.pool.give(gone.offset, ticket.positions)


def clip(group: Hashable, index: int, seconds: float, at: float = 0.0) -> Arrival:
    """As the pipeline makes it: 13 positions a second and a frame of 20; 4 tokens a second are spoken."""
    return Arrival(at, Ticket(group, index, 20 + round(13 * seconds), token_budget(seconds)), 1 + round(4 * seconds))


def job(group: Hashable, clips: int, seed: int, at: float = 0.0) -> list[Arrival]:
    """Clips of 1 to 30 s, as voice activity cuts them: many short ones, many near the limit."""
    dice = random.Random(seed)
    return [clip(group, index, min(30.0, dice.uniform(1, 45)), at) for index in range(clips)]


POOL, ROWS = 20_000, 32

arrivals = st.lists(
    st.builds(
        lambda group, at, prompt, budget, part: (group, at, prompt, budget, max(1, round(budget * part))),
        st.integers(0, 3),
        st.floats(0, 20),
        st.integers(1, 300),
        st.integers(1, 300),
        st.floats(0, 1),
    ),
    min_size=1,
    max_size=40,
)


def numbered(raw: Sequence[tuple[int, float, int, int, int]]) -> list[Arrival]:
    """Clips with an index each."""
    return [
        Arrival(at, Ticket(group, index, prompt, budget), tokens)
        for index, (group, at, prompt, budget, tokens) in enumerate(raw)
    ]


@settings(max_examples=150, deadline=None)
@given(arrivals, st.integers(600, 2000), st.integers(1, 8), st.sampled_from([0.0, 0.5, PATIENCE]))
def test_every_clip_ends_in_a_row_and_region_of_its_own(
    raw: list[tuple[int, float, int, int, int]], positions: int, rows: int, patience: float
) -> None:
    """Regions and rows are checked by the simulator, which also fails where fragments or held places block for good."""
    clips = numbered(raw)
    scheduler = Scheduler(positions, rows, patience)
    run = simulate(scheduler, clips)
    assert run.ended.keys() == {one.ticket for one in clips}
    assert run.widest <= rows
    assert (scheduler.running, scheduler.waiting) == (0, 0)
    whole = Ticket("whole", 0, positions - 1, 1)
    scheduler.submit(whole, 1000.0)
    assert scheduler.admit(1000.0) == [Admission(whole, 0, 0)]


@settings(max_examples=50, deadline=None)
@given(arrivals)
def test_results_can_be_put_in_order_and_runs_repeat(raw: list[tuple[int, float, int, int, int]]) -> None:
    clips = numbered(raw)
    first, second = (simulate(Scheduler(700, 3), clips) for _ in range(2))
    assert first == second
    assert sorted(one.index for one in first.ended) == list(range(len(clips)))


@settings(max_examples=100, deadline=None)
@given(arrivals, st.integers(1, 12), st.randoms(use_true_random=False))
def test_cancel_frees_all_that_a_clip_has(
    raw: list[tuple[int, float, int, int, int]], rows: int, dice: random.Random
) -> None:
    """Whatever is cancelled in whatever order, the others run, and nothing is held when all are gone."""
    scheduler = Scheduler(1500, rows)
    tickets = [one.ticket for one in numbered(raw)]
    for ticket in tickets:
        scheduler.submit(ticket, 0.0)
    running = {one.ticket for one in scheduler.admit(0.0)}
    gone = [ticket for ticket in tickets if dice.random() < 0.5]
    dice.shuffle(gone)
    for ticket in gone:
        scheduler.cancel(ticket, 0.0)
        with pytest.raises(KeyError):
            scheduler.cancel(ticket, 0.0)
    left = set(tickets) - set(gone)
    running -= set(gone)
    assert (scheduler.running, scheduler.waiting) == (len(running), len(left) - len(running))
    while left:
        running |= {one.ticket for one in scheduler.admit(0.0)}
        assert running <= left
        ended = running.pop()
        scheduler.finish(ended)
        left.remove(ended)
    whole = Ticket("whole", 0, 1500, 0)
    scheduler.submit(whole, 0.0)
    assert scheduler.admit(0.0) == [Admission(whole, 0, 0)]


def test_cancelling_an_overdue_clip_lets_the_others_pass() -> None:
    """What came behind it has not waited so long, and is not served as if it had."""
    scheduler, late = Scheduler(100, 4), PATIENCE + 1
    running, overdue, behind = Ticket("a", 0, 30, 30), Ticket("b", 0, 30, 20), Ticket("b", 1, 30, 19)
    small = Ticket("c", 0, 10, 10)
    for ticket in (running, overdue, behind):
        scheduler.submit(ticket, 0.0)
    assert [one.ticket for one in scheduler.admit(0.0)] == [running]
    scheduler.submit(small, late)
    assert scheduler.admit(late) == []
    scheduler.cancel(overdue, late)
    assert [one.ticket for one in scheduler.admit(late)] == [small]
    scheduler.cancel(running, late)
    assert [one.ticket for one in scheduler.admit(late)] == [behind]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 20), st.floats(0, 1)), max_size=40))
def test_pool_is_a_set_of_free_positions(moves: list[int | float]) -> None:
    """An integer takes so many positions, a fraction gives one of the taken regions back."""
    pool, free, taken = CachePool(40), set(range(40)), []
    for move in moves:
        if isinstance(move, float):
            if taken:
                start, size = taken.pop(int(move * (len(taken) - 1)))
                pool.give(start, size)
                free |= set(range(start, start + size))
            continue
        assert pool.largest == max((size for size in range(41) if first_place(free, size) is not None), default=0)
        found = pool.take(move)
        assert found == first_place(free, move)
        if found is not None:
            taken.append((found, move))
            free -= set(range(found, found + move))
        assert pool.free == len(free)


def first_place(free: set[int], size: int) -> int | None:
    """Of 40 positions, the first of so many free ones in a row."""
    return next((start for start in range(41 - size) if free.issuperset(range(start, start + size))), None)


def test_pool_refuses_what_is_free_already() -> None:
    pool = CachePool(10)
    assert pool.take(4) == 0
    assert pool.take(4) == 4
    pool.give(0, 4)
    for start, size in ((0, 4), (2, 4), (6, 4), (8, 1), (8, 4)):
        with pytest.raises(ValueError, match="not all taken"):
            pool.give(start, size)
    pool.give(4, 4)
    assert pool.take(10) == 0


def test_what_can_never_fit_is_refused_at_once() -> None:
    scheduler = Scheduler(100, 2)
    with pytest.raises(ResourceError, match=r"needs 101 cache positions and the cache has 100: use shorter pieces"):
        scheduler.submit(Ticket("a", 0, 60, 41), 0.0)
    with pytest.raises(KeyError):
        scheduler.cancel(Ticket("a", 0, 60, 41), 0.0)
    scheduler.submit(Ticket("a", 0, 60, 40), 0.0)
    with pytest.raises(ValueError, match="clip 0 of 'a' is here already"):
        scheduler.submit(Ticket("a", 0, 1, 1), 0.0)
    with pytest.raises(ValueError, match="needs positions and rows"):
        Scheduler(100, 0)


def test_only_running_clips_can_finish() -> None:
    scheduler = Scheduler(100, 1)
    first, second = Ticket("a", 0, 60, 40), Ticket("a", 1, 30, 10)
    scheduler.submit(first, 0.0)
    scheduler.submit(second, 0.0)
    assert [one.ticket for one in scheduler.admit(0.0)] == [first]
    with pytest.raises(KeyError):
        scheduler.finish(second)
    scheduler.finish(first)
    assert [one.ticket for one in scheduler.admit(0.0)] == [second]
    scheduler.finish(second)
    scheduler.submit(first, 1.0)
    assert (scheduler.running, scheduler.waiting) == (0, 1)


def test_lowest_rows_are_taken_first() -> None:
    scheduler = Scheduler(100, 3)
    tickets = [Ticket("a", index, 5, 5) for index in range(4)]
    for ticket in tickets:
        scheduler.submit(ticket, 0.0)
    assert [one.row for one in scheduler.admit(0.0)] == [0, 1, 2]
    scheduler.finish(tickets[1])
    assert [(one.row, one.offset) for one in scheduler.admit(0.0)] == [(1, 10)]


def test_a_small_request_passes_a_big_job_that_came_before() -> None:
    """It starts with the first region that is free, though 300 clips came before it; first come makes it wait."""
    clips = [*job("big", 300, seed=1), clip("small", 0, 10.0, at=0.5)]
    ours = simulate(Scheduler(POOL, ROWS), clips)
    plain = simulate(FirstCome(POOL, ROWS), clips)
    assert ours.started[clips[-1].ticket] - 0.5 < 0.2
    assert plain.started[clips[-1].ticket] - 0.5 > 5 * (ours.started[clips[-1].ticket] - 0.5)


def test_equal_jobs_get_equal_shares() -> None:
    clips = [*job("one", 120, seed=2), *job("two", 120, seed=2)]
    assert ends(Scheduler(POOL, ROWS), clips)["one"] == pytest.approx(
        ends(Scheduler(POOL, ROWS), clips)["two"], rel=0.1
    )
    assert ends(FirstCome(POOL, ROWS), clips)["one"] < 0.7 * ends(FirstCome(POOL, ROWS), clips)["two"]


def ends(policy: Policy, clips: Sequence[Arrival]) -> dict[Hashable, float]:
    """When each group's last clip ends."""
    found: dict[Hashable, float] = {}
    for ticket, end in simulate(policy, clips).ended.items():
        found[ticket.group] = max(end, found.get(ticket.group, 0.0))
    return found


def test_longest_first_ends_sooner_than_first_come() -> None:
    """The last clips of a job decide: a long one that starts last keeps a nearly empty batch running."""
    gains = []
    for seed in range(10):
        clips = job("a", 80, seed)
        gains.append(simulate(FirstCome(POOL, ROWS), clips).makespan / simulate(Scheduler(POOL, ROWS), clips).makespan)
    assert statistics.mean(gains) > 1.03
    assert min(gains) > 0.99


def test_a_flood_of_small_requests_does_not_starve_a_big_clip() -> None:
    """Every 5 ms a new request of 10 s takes the regions that a clip of the whole cache waits for."""
    whole = Arrival(1.0, Ticket("whole", 0, 1000, 1000), 400)
    flood = [clip(f"small {index}", 0, 10.0, at=0.005 * index) for index in range(1500)]
    run = simulate(Scheduler(2000, 8), [whole, *flood])
    assert PATIENCE < run.started[whole.ticket] - 1.0 < PATIENCE + 1.0


def test_a_short_clip_of_an_endless_group_is_not_starved() -> None:
    """Long clips that come later pass it only for the seconds that their length is worth."""
    short = Arrival(0.0, Ticket("live", 0, 10, 10), 10)
    stream = [Arrival(0.02 * index, Ticket("live", index, 500, 500), 400) for index in range(1, 1000)]
    run = simulate(Scheduler(1000, 1), [short, Arrival(0.0, Ticket("live", 1000, 500, 500), 400), *stream])
    passing = [one for one in stream if run.started[one.ticket] < run.started[short.ticket]]
    assert passing
    assert max(one.at for one in passing) <= (1000 - 20) / RATE + STEPS


def test_backfill_passes_a_clip_that_does_not_fit_yet() -> None:
    scheduler = Scheduler(100, 4)
    running, big, small = Ticket("a", 0, 30, 30), Ticket("a", 1, 30, 25), Ticket("a", 2, 20, 10)
    for ticket in (running, big, small):
        scheduler.submit(ticket, 0.0)
    assert [one.ticket for one in scheduler.admit(0.0)] == [running, small]
    scheduler.finish(small)
    later = Ticket("b", 0, 10, 10)
    scheduler.submit(later, PATIENCE + 1)
    assert scheduler.admit(PATIENCE + 1) == []
    scheduler.finish(running)
    assert [one.ticket for one in scheduler.admit(PATIENCE + 1)] == [big, later]
