"""The protocol between the pipeline and whatever runs the network: submit clips, get tokens. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from quasr.errors import ModelError, ResourceError
from quasr.types import SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from quasr.types import FinishReason

AUDIO_TOKENS_PER_SECOND = 13
BUDGET_MARGIN = 32


def token_budget(seconds: float) -> int:
    """Most new tokens that a clip of `seconds` may take.

    Fast speech makes about 4 tokens a second with the 151,936-entry vocabulary and about 10 with a small one.
    The audio's own 13 tokens a second, and 32 for the language head, is therefore more than any real transcript.
    """
    return round(seconds * AUDIO_TOKENS_PER_SECOND) + BUDGET_MARGIN


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """One clip. `samples` is (n,) float32 at 16 kHz, of which the engine makes log-mel frames where that is fastest;
    the prompt is `prefix`, one position an audio token, `suffix`.

    With `stop_loops` decoding ends in a loop of tokens (`quasr.text.loops`) and not at the budget.
    `draft` guesses the tokens, as a transcript of an earlier part of the same audio does: where it is right they come
    faster, and they are the same whatever it says. An engine may ignore it.
    """

    samples: NDArray[np.float32]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    max_new_tokens: int
    stop_loops: bool = False
    draft: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ticket:
    """A submitted clip: the `number`-th of its engine, and the group (file, request) that it is counted with."""

    group: Hashable
    number: int


@dataclass(frozen=True, slots=True)
class ClipResult:
    """New tokens without the stop token, with the natural-log probability of each. "loop": they end in one, whole."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What runs, where, and why: printed by `quasr doctor` and in the timing lines.

    `dtype` is what is computed in, `scheme` the recipe that the weights are quantised by, `weight_bytes` their memory
    with scales and all. `in_flight`: clips that it is best given at once, of which it decodes as many as fit while the
    others wait; 0 where a batch of the caller's size is all that it can use.
    """

    name: str
    device: str
    dtype: str
    weight_bytes: int
    reasons: tuple[str, ...] = ()
    scheme: str = "none"
    in_flight: int = 0


@dataclass(slots=True)
class EngineStats:
    """Seconds and tokens summed over all runs of an engine."""

    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    generate_seconds: float = 0.0
    tokens: int = 0


class Engine(Protocol):
    """Runs clips through the network. Not thread-safe: one caller at a time.

    A call that raises ends the work on all clips that were submitted; the engine can be used again.
    """

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> EngineStats: ...

    def submit(self, request: ClipRequest, group: Hashable = 0) -> Ticket:
        """Queues a clip. Groups share the engine fairly. Raises ResourceError for a clip that can never fit."""
        ...

    def step(self) -> list[tuple[Ticket, ClipResult]]:
        """Advances the work a little; gives the clips that have finished, in no particular order.

        Raises ResourceError when memory runs out and ModelError when the network computes NaN.
        """
        ...

    def cancel(self, what: Hashable) -> None:
        """Forgets one clip, by its ticket, or all clips of a group. What has finished or is unknown is left alone."""
        ...

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        """Decodes these clips to their ends, results in the order of `requests`. Raises as `submit` and `step`."""
        ...

    def close(self) -> None:
        """Gives the memory back. The engine cannot be used afterwards."""
        ...


class Reporting:
    """`info` and `stats` of an engine that keeps them in `_info` and `_stats`."""

    _info: EngineInfo
    _stats: EngineStats

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats


class BatchQueue:
    """Lets an engine that has only `run` be submitted to: a step decodes all that waits, as one batch."""

    def __init__(self) -> None:
        self._waiting: dict[Ticket, ClipRequest] = {}
        self._submitted = 0

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        """As `Engine.run`."""
        raise NotImplementedError

    def submit(self, request: ClipRequest, group: Hashable = 0) -> Ticket:
        """As `Engine.submit`."""
        ticket = Ticket(group, self._submitted)
        self._submitted += 1
        self._waiting[ticket] = request
        return ticket

    def step(self) -> list[tuple[Ticket, ClipResult]]:
        """As `Engine.step`. The caller bounds the batch by what it submits."""
        batch, self._waiting = self._waiting, {}
        return list(zip(batch, self.run(list(batch.values())), strict=True))

    def cancel(self, what: Hashable) -> None:
        """As `Engine.cancel`."""
        self._waiting = {ticket: request for ticket, request in self._waiting.items() if not belongs(ticket, what)}


def belongs(ticket: Ticket, what: Hashable) -> bool:
    """Whether `Engine.cancel(what)` concerns this ticket."""
    return what in (ticket, ticket.group)


def nan_error(dtype: str) -> ModelError:
    """For a network that computed NaN in `dtype` (bf16, fp16, fp32)."""
    return ModelError(
        f"the network computed NaN in {dtype}: use --dtype bf16 or fp32; if it stays, the checkpoint is damaged"
    )


def memory_error(device: str, requests: Sequence[ClipRequest]) -> ResourceError:
    """For a device whose memory ran out with these clips."""
    longest = max((len(request.samples) for request in requests), default=0) / SAMPLE_RATE
    return ResourceError(
        f"out of memory on {device} with {len(requests)} clips of up to {longest:.0f} s: "
        "use a smaller batch (--batch-size), a smaller dtype or another device"
    )


def run_group(
    engine: Engine, requests: Sequence[ClipRequest]
) -> tuple[list[ClipResult], list[tuple[Ticket, ClipResult]]]:
    """The results of `requests` in their order, through `submit` and `step`, and what else has ended meanwhile.

    Raises as those do, after cancelling what was submitted here.
    """
    group = object()
    found: dict[Ticket, ClipResult] = {}
    others: list[tuple[Ticket, ClipResult]] = []
    try:
        tickets = [engine.submit(request, group) for request in requests]
        while len(found) < len(tickets):
            for ticket, result in engine.step():
                if ticket.group is group:
                    found[ticket] = result
                else:
                    others.append((ticket, result))
    except BaseException:
        engine.cancel(group)
        raise
    return [found[ticket] for ticket in tickets], others
