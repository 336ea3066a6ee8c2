"""The network in ONNX Runtime behind the engine protocol: no torch, weights mapped from the folder, greedy decoding.

Prompts run one by one, because a CPU gains nothing from batches of them and padding costs it work; steps run for all
clips at once, because then the weights, which a step mostly waits for, are read once for all.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from quasr.engine.base import ClipRequest, ClipResult, EngineInfo, EngineStats
from quasr.engine.onnx_audio import AudioGraphs
from quasr.engine.onnx_decoder import DecoderGraph
from quasr.engine.onnx_session import memory_advice, open_session
from quasr.engine.row import Row
from quasr.engine.token_table import TokenTable
from quasr.errors import ModelError, ResourceError
from quasr.export.manifest import read_manifest
from quasr.types import SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from quasr.engine.onnx_session import Runtime


class OnnxEngine:
    """Runs the ONNX folder `folder` (docs/onnx.md) by `runtime`. One caller at a time.

    Raises CheckpointError for a folder that is damaged or of a newer version, ResourceError where the provider does
    not start.
    """

    def __init__(self, folder: Path, stop_ids: Collection[int], runtime: Runtime) -> None:
        manifest = read_manifest(folder)
        sessions = {name: open_session(folder / f"{name}.onnx", runtime) for name in ("stem", "encoder", "decoder")}
        self._facts = manifest.graph
        self._audio: AudioGraphs | None = AudioGraphs(sessions["stem"], sessions["encoder"], manifest.graph)
        self._session: Any = sessions["decoder"]
        self._table = TokenTable(folder, manifest.embedding)
        self._stop_ids = frozenset(stop_ids)
        self._stats = EngineStats()
        quantised = manifest.weights != "fp32"
        met = (f"{manifest.activations} activations where weights are {manifest.weights}",) if quantised else ()
        self._info = EngineInfo(
            name="onnx",
            device=runtime.device,
            dtype="fp32",
            weight_bytes=sum(file.size for name, file in manifest.files.items() if name.endswith(".data")),
            reasons=(*runtime.reasons, *met),
            scheme=f"{manifest.weights}-g{manifest.group}" if quantised else "none",
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        """Decodes all clips as one batch, greedily; results in the order of `requests`.

        Raises ResourceError when memory runs out or a clip is longer than the folder's graphs, and ModelError when the
        network computes NaN.
        """
        if self._audio is None:
            raise RuntimeError("the engine is closed")
        if not requests:
            return []
        with memory_advice(_advice(requests, self._info.device)):
            with self._clock("encode_seconds"):
                prompts = [self._prompt(request, self._audio) for request in requests]
            rows = [self._row(request, len(prompt)) for request, prompt in zip(requests, prompts, strict=True)]
            self._decode(rows, prompts)
        self._stats.tokens += sum(len(row.tokens) for row in rows)
        return [row.result() for row in rows]

    def close(self) -> None:
        """Gives the memory back. `run` raises RuntimeError afterwards."""
        self._audio = self._session = None

    def _prompt(self, request: ClipRequest, audio: AudioGraphs) -> NDArray[np.float32]:
        """(positions, hidden): prefix tokens, audio vectors, suffix tokens."""
        before, after = self._table.rows(request.prefix), self._table.rows(request.suffix)
        return np.concatenate([before, audio.encode(request.samples), after])

    def _row(self, request: ClipRequest, length: int) -> Row:
        """With a budget that keeps within the positions that the graphs know."""
        row, room = Row.of(request, length), self._facts.positions - length
        if room < 1:
            raise ResourceError(
                f"a clip of {len(request.samples) / SAMPLE_RATE:.0f} s makes {length} positions and these ONNX graphs "
                f"have {self._facts.positions}: use shorter pieces"
            )
        row.budget = min(row.budget, room)
        return row

    def _decode(self, rows: Sequence[Row], prompts: list[NDArray[np.float32]]) -> None:
        """Every prompt, then a token a row and step until all rows are finished."""
        capacity = max(row.position + row.budget for row in rows)
        graph = DecoderGraph(self._session, self._facts, len(rows), capacity)
        with self._clock("prefill_seconds"):
            active: list[Row] = []
            for row in rows:
                active.append(row)
                self._take(graph.prefill(len(active) - 1, prompts.pop(0)), [row])
                _drop_finished(active, graph)
        with self._clock("generate_seconds"):
            while active:
                newest = self._table.rows([row.tokens[-1] for row in active])
                logits = graph.step(newest, [row.position for row in active])
                for row in active:
                    row.position += 1
                self._take(logits, active)
                _drop_finished(active, graph)

    def _take(self, logits: NDArray[np.float32], rows: Sequence[Row]) -> None:
        """Gives each row its likeliest token, with log softmax(logits): (rows, vocab)."""
        tokens = logits.argmax(axis=1)
        best = logits[np.arange(len(rows)), tokens]
        # NaN reaches the sum from wherever it is in the row.
        logprobs = -np.log(np.exp(logits - best[:, None]).sum(axis=1))
        if not np.isfinite(logprobs).all():
            raise ModelError("the network computed NaN: export the model again; if it stays, the checkpoint is damaged")
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.take(token, logprob, self._stop_ids)

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        setattr(self._stats, stage, getattr(self._stats, stage) + time.perf_counter() - started)


def _drop_finished(active: list[Row], graph: DecoderGraph) -> None:
    """Takes finished rows out: the last row moves into the place that one leaves, with what its cache holds."""
    for index in reversed(range(len(active))):
        if active[index].finish_reason is None:
            continue
        last = active.pop()
        if index < len(active):
            graph.move(len(active), index, last.position)
            active[index] = last


def _advice(requests: Sequence[ClipRequest], device: str) -> str:
    longest = max(len(request.samples) for request in requests) / SAMPLE_RATE
    return (
        f"out of memory on {device} with {len(requests)} clips of up to {longest:.0f} s: "
        "use a smaller batch (--batch-size), shorter pieces or smaller weights (--compute-type int4)"
    )
