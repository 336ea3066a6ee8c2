"""Continuous batching: which clip may start when, in which row, and where in the cache. Pure; the clock is passed in.

An engine's thread submits clips, and then repeats: `admit`, prefill what was admitted, some decode steps, `finish`
the rows that stopped; `cancel` takes a clip back at any time. A clip's cache is one region of its prompt and token
budget, so that an admitted clip always runs to its end: nothing is ever evicted or computed twice.

Order. Between groups (files, requests): the one that holds the least of the cache goes first, so that a big job leaves
the next free region to a small request that came later. Inside a group: the longest first, because a long clip that
starts last runs alone. Neither can starve a clip: `RATE` bounds how many can pass it inside its group, and a group
whose first clip has waited for `patience` seconds is served before all others, which then wait for its region.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from quasr.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

LOOKAHEAD = 32
"""Clips of a group that are tried, in their order, where the first does not fit into any free region."""

RATE = 200.0
"""Positions that a clip gains on later clips for each second that it came before them."""

PATIENCE = 5.0
"""Seconds that the first clip of a group waits before others are held back for it."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """One clip: the `index`-th of its `group`, with `prompt` positions and at most `budget` new tokens."""

    group: Hashable
    index: int
    prompt: int
    budget: int

    @property
    def positions(self) -> int:
        """Cache positions that it may fill."""
        return self.prompt + self.budget


@dataclass(frozen=True, slots=True)
class Admission:
    """A clip that may start: its row of the batch and the first position of its region of the cache."""

    ticket: Ticket
    row: int
    offset: int


class CachePool:
    """`positions` places of a cache, handed out as contiguous regions: first fit, free neighbours become one."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self._free: list[tuple[int, int]] = [(0, positions)] if positions else []

    @property
    def free(self) -> int:
        """Positions that nobody has."""
        return sum(size for _, size in self._free)

    @property
    def largest(self) -> int:
        """The largest region that `take` can give."""
        return max((size for _, size in self._free), default=0)

    def take(self, size: int) -> int | None:
        """The start of the first free region of `size` positions; None where there is none."""
        for index, (start, room) in enumerate(self._free):
            if room >= size:
                self._free[index : index + 1] = [(start + size, room - size)] if room > size else []
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """Frees a region that `take` gave. Raises ValueError where part of it is free already."""
        index = bisect_left(self._free, (start, 0))
        before = self._free[index - 1] if index else (0, 0)
        after = self._free[index] if index < len(self._free) else (self.positions, 0)
        if sum(before) > start or start + size > after[0]:
            raise ValueError(f"positions {start} to {start + size} are not all taken")
        first, last = index, index
        if index and sum(before) == start:
            first, start, size = index - 1, before[0], size + before[1]
        if after[1] and start + size == after[0]:
            last, size = index + 1, size + after[1]
        self._free[first:last] = [(start, size)]


@dataclass(order=True, slots=True)
class Waiting:
    """A clip in its group's order: `rank` is when it came, less its length over `RATE`; it never changes."""

    rank: float
    number: int
    ticket: Ticket = field(compare=False)


@dataclass(slots=True)
class Group:
    """What belongs together. `held`: positions of its running clips; `since`: when its first clip last changed.

    `known`: the indices of what waits and runs.
    """

    since: float
    waiting: list[Waiting] = field(default_factory=list)
    running: dict[int, Admission] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    held: int = 0


class Scheduler:
    """Clips of many groups over a cache of `positions` and a batch of `rows`, lowest row first. One thread at a time.
    Some of the rows may be such that their clips only wait to be decoded: how many is the caller's.

    Seconds are the caller's: any clock that does not go back. What was done so far and the times alone decide.
    """

    def __init__(self, positions: int, rows: int, patience: float = PATIENCE) -> None:
        if positions < 1 or rows < 1:
            raise ValueError(f"a scheduler needs positions and rows, not {positions} and {rows}")
        self._pool = CachePool(positions)
        self._rows = list(range(rows))
        self._patience = patience
        self._groups: dict[Hashable, Group] = {}
        self._submitted = 0

    @property
    def running(self) -> int:
        """Clips that are admitted and not finished."""
        return sum(len(group.running) for group in self._groups.values())

    @property
    def waiting(self) -> int:
        """Clips that are submitted and not admitted."""
        return sum(len(group.waiting) for group in self._groups.values())

    @property
    def starving(self) -> bool:
        """Whether some group has clips that wait and none that is admitted."""
        return any(group.waiting and not group.running for group in self._groups.values())

    def submit(self, ticket: Ticket, now: float) -> None:
        """Queues a clip. Raises ResourceError where it cannot ever fit, ValueError for one that is here already."""
        if ticket.positions > self._pool.positions:
            raise ResourceError(
                f"a clip needs {ticket.positions} cache positions and the cache has {self._pool.positions}: "
                "use shorter pieces, a smaller token budget (--max-new-tokens) or more memory"
            )
        group = self._groups.setdefault(ticket.group, Group(now))
        if ticket.index in group.known:
            raise ValueError(f"clip {ticket.index} of {ticket.group!r} is here already")
        group.known.add(ticket.index)
        if not group.waiting:
            group.since = now
        insort(group.waiting, Waiting(now - ticket.positions / RATE, self._submitted, ticket))
        self._submitted += 1

    def admit(self, now: float) -> list[Admission]:
        """Takes as many waiting clips as fit into free rows and regions. They hold both until `finish`."""
        admitted = []
        while self._rows:
            found = self._next(now)
            if found is None:
                break
            admitted.append(found)
        return admitted

    def finish(self, ticket: Ticket) -> None:
        """Frees the row and region of a running clip. Raises KeyError for any other."""
        group = self._groups[ticket.group]
        self._release(group, group.running.pop(ticket.index))
        group.known.remove(ticket.index)
        self._forget_empty(ticket.group)

    def cancel(self, ticket: Ticket, now: float) -> None:
        """Forgets a clip, waiting or running, and frees what it holds. Raises KeyError for any other."""
        group = self._groups[ticket.group]
        if ticket.index in group.running:
            self.finish(ticket)
            return
        group.known.remove(ticket.index)
        index = next(index for index, one in enumerate(group.waiting) if one.ticket.index == ticket.index)
        del group.waiting[index]
        if index == 0:
            group.since = now
        self._forget_empty(ticket.group)

    def _next(self, now: float) -> Admission | None:
        largest = self._pool.largest
        for group in self._order(now):
            overdue = self._overdue(group, now)
            # An overdue group's first clip is not passed by smaller ones, of its own group neither.
            for index, one in enumerate(islice(group.waiting, 1 if overdue else LOOKAHEAD)):
                if one.ticket.positions <= largest:
                    return self._start(group, index, now)
            if overdue:
                return None
        return None

    def _order(self, now: float) -> Iterator[Group]:
        """Groups with waiting clips: those that waited too long, the longest first, then by what they hold."""
        waiting = [group for group in self._groups.values() if group.waiting]
        yield from sorted((one for one in waiting if self._overdue(one, now)), key=lambda one: one.since)
        yield from sorted((one for one in waiting if not self._overdue(one, now)), key=lambda one: one.held)

    def _overdue(self, group: Group, now: float) -> bool:
        return now - group.since > self._patience

    def _start(self, group: Group, index: int, now: float) -> Admission:
        ticket = group.waiting.pop(index).ticket
        offset = self._pool.take(ticket.positions)
        assert offset is not None, "the largest region was asked for"
        admission = Admission(ticket, heapq.heappop(self._rows), offset)
        group.running[ticket.index] = admission
        group.held += ticket.positions
        if index == 0:
            group.since = now
        return admission

    def _forget_empty(self, name: Hashable) -> None:
        if not self._groups[name].known:
            del self._groups[name]

    def _release(self, group: Group, admission: Admission) -> None:
        heapq.heappush(self._rows, admission.row)
        self._pool.give(admission.offset, admission.ticket.positions)
        group.held -= admission.ticket.positions
