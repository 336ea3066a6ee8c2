"""The network in ONNX Runtime behind the engine protocol: no torch, weights mapped from the folder, greedy decoding.

Prompts run one by one, because a CPU gains nothing from batches of them and padding costs it work; steps run for all
clips at once, because then the weights, which a step mostly waits for, are read once for all.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import numpy as np

from quasr.engine.base import (
    ClipRequest,
    ClipResult,
    EngineInfo,
    EngineStats,
    Reporting,
    Ticket,
    belongs,
    memory_error,
    nan_error,
    run_group,
)
from quasr.engine.encoding import Encoding
from quasr.engine.native_decoder import open_native
from quasr.engine.onnx_audio import AudioGraphs, token_count
from quasr.engine.onnx_decoder import Choice, OnnxNetwork
from quasr.engine.onnx_session import open_session, out_of_memory
from quasr.engine.row import Row
from quasr.engine.token_table import TokenTable
from quasr.errors import ResourceError
from quasr.export.manifest import read_manifest
from quasr.types import SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from quasr.engine.onnx_session import Runtime
    from quasr.export.manifest import Manifest

MOST_ROWS = 8
"""Clips that are decoded at once: more gain little on a CPU, and each holds its keys and values in memory."""


class Decoder(Protocol):
    """A cache and the network over it; `quasr.engine.onnx_decoder.DecoderGraph` says what its calls do."""

    rows: int
    capacity: int

    def prefill(self, row: int, embeddings: NDArray[np.float32]) -> Choice: ...

    def step(self, embeddings: NDArray[np.float32], positions: Sequence[int]) -> Choice: ...

    def move(self, source: int, target: int, filled: int) -> None: ...


class Network(Protocol):
    """The decoder's weights: ONNX Runtime's, or `quasr.engine.native_decoder.NativeNetwork`."""

    def cache(self, rows: int, capacity: int) -> Decoder: ...


@dataclass(slots=True)
class Running:
    """A clip that has a row of the cache: the one of its own index among those that run."""

    ticket: Ticket
    request: ClipRequest
    row: Row


class OnnxEngine(Reporting):
    """Runs the ONNX folder `folder` (docs/onnx.md) by `runtime`. One caller at a time.

    `reasons`: why it is this engine.
    Raises CheckpointError for a folder that is damaged or of a newer version, ResourceError where the provider does
    not start.
    """

    def __init__(
        self, folder: Path, stop_ids: Collection[int], runtime: Runtime, reasons: tuple[str, ...] = ()
    ) -> None:
        manifest = read_manifest(folder)
        # The decoder first: while ONNX Runtime loads it, it takes twice its head, where the others fit in afterwards.
        network, reason = open_native(folder, manifest, runtime)
        self._network: Network | None = network or _onnx_network(folder, manifest, runtime)
        stem, encoder = (open_session(folder / f"{name}.onnx", runtime) for name in ("stem", "encoder"))
        self._facts = manifest.graph
        audio = AudioGraphs(stem, encoder, manifest.graph)
        self._encoding = Encoding(audio.encode, ahead=runtime.ahead)
        self._graph: Decoder | None = None
        self._table = TokenTable(folder, manifest.embedding)
        self._stop_ids = frozenset(stop_ids)
        self._stats = EngineStats()
        self._info = _info(manifest, runtime, (*reasons, *runtime.reasons, reason), in_c=network is not None)
        self._submitted = 0
        self._waiting: dict[Ticket, ClipRequest] = {}
        self._running: list[Running] = []
        self._ready: list[tuple[Ticket, ClipResult]] = []

    def submit(self, request: ClipRequest, group: Hashable = 0) -> Ticket:
        """Queues a clip. Raises ResourceError for one that is longer than the folder's graphs."""
        if self._network is None:
            raise RuntimeError("the engine is closed")
        prompt = self._prompt_length(request)
        if prompt >= self._facts.positions:
            raise ResourceError(
                f"a clip of {len(request.samples) / SAMPLE_RATE:.0f} s makes {prompt} positions and these ONNX graphs "
                f"have {self._facts.positions}: use shorter pieces"
            )
        ticket = Ticket(group, self._submitted)
        self._submitted += 1
        self._waiting[ticket] = request
        return ticket

    def step(self) -> list[tuple[Ticket, ClipResult]]:
        """Takes one clip in, to its first token, or makes one more token of all that run; gives what has finished.

        Raises ResourceError when memory runs out and ModelError when the network computes NaN.
        """
        try:
            self._advance()
        except BaseException as error:
            requests = [*(one.request for one in self._running), *self._waiting.values()]
            self._waiting, self._running, self._ready, self._graph = {}, [], [], None
            self._encoding.drop()
            if isinstance(error, Exception) and out_of_memory(error):
                raise memory_error(self._info.device, requests) from error
            raise
        ready, self._ready = self._ready, []
        return ready

    def cancel(self, what: Hashable) -> None:
        """Forgets one clip, by its ticket, or all clips of a group."""
        self._waiting = {ticket: request for ticket, request in self._waiting.items() if not belongs(ticket, what)}
        self._encoding.forget(what)
        for index in reversed(range(len(self._running))):
            if belongs(self._running[index].ticket, what):
                self._leave(index)

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        """Decodes all clips, greedily; results in the order of `requests`. Raises as `submit` and `step`."""
        if self._network is None:
            raise RuntimeError("the engine is closed")
        results, self._ready = run_group(self, requests)
        return results

    def close(self) -> None:
        """Gives the memory back. The engine cannot be used afterwards."""
        self._encoding.close()
        self._network = self._graph = None
        self._waiting, self._running, self._ready = {}, [], []

    def _advance(self) -> None:
        chosen = self._next()
        if chosen is not None:
            self._admit(chosen, self._waiting.pop(chosen))
        elif self._running:
            self._decode()
        for index in reversed(range(len(self._running))):
            one = self._running[index]
            if one.row.finish_reason is not None:
                self._stats.tokens += len(one.row.tokens)
                self._ready.append((one.ticket, one.row.result()))
                self._leave(index)

    def _next(self) -> Ticket | None:
        """The clip to take in now; None where none has room.

        A clip that is too long for the cache waits until nothing runs; others do not pass it.
        """
        if not self._waiting:
            return None
        chosen = self._first()
        return chosen if not self._running or self._fits(self._waiting[chosen]) else None

    def _first(self) -> Ticket:
        """Of those that wait, of the group that runs the fewest, the one that came first."""
        held = [one.ticket.group for one in self._running]
        return min(self._waiting, key=lambda ticket: (held.count(ticket.group), ticket.number))

    def _look_ahead(self) -> None:
        """Has the encoder begin on the clip that comes next, where it may work beside the decoder."""
        if self._encoding.wants and self._waiting:
            ticket = self._first()
            self._encoding.begin(ticket, self._waiting[ticket].samples)

    def _fits(self, request: ClipRequest) -> bool:
        graph = self._graph
        return graph is not None and len(self._running) < graph.rows and self._positions(request) <= graph.capacity

    def _admit(self, ticket: Ticket, request: ClipRequest) -> None:
        """Encodes a clip and runs its prompt, which gives its first token."""
        with self._clock("encode_seconds"):
            before, after = self._table.rows(request.prefix), self._table.rows(request.suffix)
            prompt = np.concatenate([before, self._encoding.take(ticket, request.samples), after])
        row = Row.of(request, len(prompt))
        row.budget = min(row.budget, self._facts.positions - len(prompt))
        self._running.append(Running(ticket, request, row))
        self._look_ahead()
        with self._clock("prefill_seconds"):
            graph = self._cache(request)
            self._take(graph.prefill(len(self._running) - 1, prompt), [row])

    def _cache(self, request: ClipRequest) -> Decoder:
        """The cache that runs, or one for this clip and those that wait behind it."""
        assert self._network is not None
        if len(self._running) > 1 and self._graph is not None:
            return self._graph
        together = [request, *islice(self._waiting.values(), MOST_ROWS - 1)]
        capacity = max(map(self._positions, together))
        if self._graph is None or self._graph.rows < len(together) or self._graph.capacity < capacity:
            self._graph = None  # before the next one is made, so that there are never two
            self._graph = self._network.cache(len(together), capacity)
        return self._graph

    def _decode(self) -> None:
        """One more token for all that run."""
        assert self._graph is not None
        self._look_ahead()
        rows = [one.row for one in self._running]
        with self._clock("generate_seconds"):
            newest = self._table.rows([row.tokens[-1] for row in rows])
            choice = self._graph.step(newest, [row.position for row in rows])
            for row in rows:
                row.position += 1
            self._take(choice, rows)

    def _take(self, choice: Choice, rows: Sequence[Row]) -> None:
        """Gives each row its token."""
        if not np.isfinite(choice.logprobs).all():
            raise nan_error("fp32")
        for row, token, logprob in zip(rows, choice.tokens.tolist(), choice.logprobs.tolist(), strict=True):
            row.take(token, logprob, self._stop_ids)

    def _leave(self, index: int) -> None:
        """Takes a row out: the last row moves into its place, with what its cache holds."""
        last = self._running.pop()
        if index < len(self._running):
            assert self._graph is not None
            self._graph.move(len(self._running), index, last.row.position)
            self._running[index] = last

    def _prompt_length(self, request: ClipRequest) -> int:
        return len(request.prefix) + token_count(self._facts, len(request.samples)) + len(request.suffix)

    def _positions(self, request: ClipRequest) -> int:
        """Cache positions that a clip may fill."""
        return min(self._prompt_length(request) + request.max_new_tokens, self._facts.positions)

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        setattr(self._stats, stage, getattr(self._stats, stage) + time.perf_counter() - started)


def _onnx_network(folder: Path, manifest: Manifest, runtime: Runtime) -> OnnxNetwork:
    return OnnxNetwork(open_session(folder / "decoder.onnx", runtime), manifest.graph)


def _info(manifest: Manifest, runtime: Runtime, reasons: tuple[str, ...], *, in_c: bool) -> EngineInfo:
    quantised = manifest.weights != "fp32"
    but = ", 16-bit ones in the decoder" if in_c else ""
    met = (f"{manifest.activations} activations where weights are {manifest.weights}{but}",) if quantised else ()
    return EngineInfo(
        name="onnx",
        device=runtime.device,
        dtype="fp32",
        weight_bytes=sum(file.size for name, file in manifest.files.items() if name.endswith(".data")),
        reasons=(*reasons, *met),
        scheme=_scheme(manifest) if quantised else "none",
    )


def _scheme(manifest: Manifest) -> str:
    return f"{manifest.weights}-g{manifest.group}" if manifest.group else manifest.weights
