"""The rows of a running batch: the clips on the host, their numbers on the device, and looks from one to the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from quasr.kernels.state import DecodeState, Places
from quasr.model.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from quasr.engine import scheduler
    from quasr.engine.base import ClipRequest, Ticket
    from quasr.engine.row import Row

SMALLEST_CAPACITY = 512
"""New tokens a row that the device has room for at first: the budget of a piece of 30 s is 422."""


@dataclass(slots=True, eq=False)
class Clip:
    """A clip on its way. `row` is what the host has heard of it.

    `draft`: what may be right of the request's; `offset`: where its region of the cache begins, once it has one;
    `heard`: tokens that the host has seen; `sure`: tokens that are written when all queued work is done, unless the
    clip ends before; `over`: it has ended or was cancelled.
    """

    ticket: Ticket
    place: scheduler.Ticket
    request: ClipRequest
    row: Row
    draft: tuple[int, ...] = ()
    offset: int | None = None
    heard: int = 0
    sure: int = 0
    over: bool = False

    @property
    def begin(self) -> int:
        """`offset` of an admitted clip."""
        assert self.offset is not None
        return self.offset

    @property
    def left(self) -> int:
        """Most steps that it can still use."""
        return self.place.budget - self.sure


@dataclass(frozen=True, slots=True)
class Look:
    """What the host will see of `clips`, once `arrived` has passed.

    lines: (rows, 2 + 2 * window) int64 on the host: cursor, finished, tokens, bits of the log-probabilities. `sure`
    is each clip's, when the look was queued.
    """

    clips: tuple[Clip, ...]
    sure: tuple[int, ...]
    lines: Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> list[tuple[Clip, Seen]]:
        """Waits for the device, and gives what is new of every clip."""
        if self.arrived is not None:
            self.arrived.synchronize()
        window = (self.lines.shape[1] - 2) // 2
        logprobs = self.lines[:, 2 + window :].to(torch.int32).view(torch.float32).tolist()
        lines = self.lines[:, : 2 + window].tolist()
        return [
            (clip, Seen(line[0], bool(line[1]), line[2:], scores, sure))
            for clip, sure, line, scores in zip(self.clips, self.sure, lines, logprobs, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Seen:
    """One clip in a look. `cursor`: tokens written so far; the last of them stand at the beginning of `tokens`."""

    cursor: int
    finished: bool
    tokens: list[int]
    logprobs: list[float]
    sure: int


class Rows:
    """Clip i stands in row i of the device's state; the rows behind the last clip are idle.

    `most` rows are decoded. The clips in the `ahead` rows behind them wait, with their first token, until they move up.
    """

    def __init__(self, most: int, ahead: int, stop_ids: Collection[int], device: torch.device) -> None:
        self.clips: list[Clip] = []
        self._most = most
        self._stop_ids = sorted(stop_ids)
        self._device = device
        self._state = DecodeState.allocate(most + ahead, SMALLEST_CAPACITY, self._stop_ids, device)
        self._heard = torch.zeros(most + ahead, dtype=torch.int64, device=device)
        self._unseen = 0

    @property
    def decoding(self) -> list[Clip]:
        """The clips that steps are for."""
        return self.clips[: self._most]

    @property
    def free(self) -> int:
        """Rows that steps are for and that have no clip."""
        return max(0, self._most - len(self.clips))

    @property
    def capacity(self) -> int:
        """New tokens that a row has room for."""
        return self._state.history.shape[1]

    def grow(self, capacity: int) -> None:
        """Room for longer rows, in tensors that take the old ones' place."""
        old = self._state
        self._state = DecodeState.allocate(old.rows, capacity, self._stop_ids, self._device)
        for name in MOVED:
            place, values = getattr(self._state, name), getattr(old, name)
            place[tuple(map(slice, values.shape))] = values

    def view(self, rows: int, first: int = 0) -> DecodeState:
        """`rows` rows of the state from `first` on, in the same memory."""
        part = slice(first, first + rows)
        return replace(self._state, **{name: getattr(self._state, name)[part] for name in MOVED})

    def admit(self, clips: Sequence[Clip], first: tuple[Tensor, Tensor]) -> None:
        """Puts prefilled clips into the next rows. `first`: their first tokens and log-probabilities (clips,)."""
        begin = len(self.clips)
        numbers = np.array([(clip.begin, clip.place.prompt, clip.place.budget) for clip in clips])
        offsets, lengths, limits = to_device(numbers, self._device).unbind(1)
        rows = torch.arange(begin, begin + len(clips), device=self._device)
        idle = torch.zeros(len(clips), dtype=torch.bool, device=self._device)
        self._state.admit(rows, Places(offsets, lengths, idle), limits, first)
        # Not by `rows`: a number that is put where an index tensor says is copied to the device, which waits for it.
        self._heard[begin : begin + len(clips)] = 0
        for clip in clips:
            clip.sure = 1
        self.clips.extend(clips)
        self._unseen = max(self._unseen, 1)

    def count_draft(self, clips: Sequence[Clip], tokens: int) -> None:
        """Notes that up to `tokens` tokens, and one at least, were written for `clips` at once."""
        for clip in clips:
            clip.sure += 1
        self._unseen += tokens

    def count_steps(self, steps: int) -> None:
        """Notes that so many steps were queued."""
        for clip in self.decoding:
            clip.sure += steps
        self._unseen += steps

    def look(self) -> Look:
        """Queues a copy of all that the host has not seen."""
        rows, state = len(self.clips), self._state
        window = torch.arange(min(self._unseen, self.capacity), device=self._device)
        index = (self._heard[:rows, None] + window).clamp_(max=self.capacity - 1)
        tokens, scores = (store[:rows].gather(1, index) for store in (state.history, state.logprobs))
        numbers = torch.stack([state.cursor[:rows], state.finished[:rows].long()], dim=1)
        lines = torch.cat([numbers, tokens, scores.view(torch.int32).long()], dim=1)
        self._heard[:rows] = state.cursor[:rows]
        self._unseen = 0
        return Look(tuple(self.clips), tuple(clip.sure for clip in self.clips), *_to_host(lines))

    def drop(self) -> None:
        """Takes the clips that are over out; the others move up, of those that wait the first of the group that has the
        fewest rows."""
        keep = [index for index, clip in enumerate(self.clips) if not clip.over]
        if len(keep) == len(self.clips):
            return
        busy = Counter(self.clips[index].ticket.group for index in keep if index < self._most)
        keep.sort(key=lambda index: busy[self.clips[index].ticket.group] if index >= self._most else -1)
        chosen = to_device(keep, self._device)
        for values in (*(getattr(self._state, name) for name in MOVED), self._heard):
            values[: len(keep)] = values[chosen]
        self._state.finished[len(keep) :] = True
        self.clips = [self.clips[index] for index in keep]


MOVED = tuple(field.name for field in fields(DecodeState) if field.name != "stop_ids")
"""Tensors of a state with a line for each row."""


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event after which it is there."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived
