"""The decoder's graph over a static key-value cache: prompts clip by clip, steps for all clips at once.

Past and present of every layer are one buffer, bound by its address, so that a step copies nothing. Rows that are
decoded stand first in the cache: a batch of n is bound as the first n rows, and a row that ends gives its place to
the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from quasr.export.manifest import GraphFacts

    Arrays = Mapping[str, NDArray[Any]]

DEVICE = ("cpu", 0)
"""Where inputs, outputs and cache lie, whatever the provider: ONNX Runtime's attention takes fp32 caches there only."""

PROMPT_SLICE = 1024
"""Positions of a prompt that go through the graph at once: bounds the memory of attention."""


class Choice(NamedTuple):
    """The likeliest token of each row, the lowest of equal ones, and its log softmax: NaN where a logit is."""

    tokens: NDArray[np.integer[Any]]
    logprobs: NDArray[np.float32]


def likeliest(logits: NDArray[np.float32]) -> Choice:
    """(rows, vocab) -> (rows,) each."""
    tokens = logits.argmax(axis=1)
    best = logits[np.arange(len(logits)), tokens]
    # NaN reaches the sum from wherever it is in the row.
    return Choice(tokens, -np.log(np.exp(logits - best[:, None]).sum(axis=1)))


class StaticCache:
    """Keys and values of `rows` clips of at most `capacity` positions; memory is taken up as it is filled."""

    def __init__(self, facts: GraphFacts, rows: int, capacity: int) -> None:
        shape = (2, facts.layers, rows, facts.kv_heads, capacity, facts.head_dim)
        self._data: NDArray[np.float32] = np.empty(shape, np.float32)

    def bind(self, binding: Any, first: int, rows: int) -> None:
        """Binds `rows` rows from `first` on as the past and the present of every layer."""
        for half, name in enumerate(("key", "value")):
            for layer in range(self._data.shape[1]):
                block = self._data[half, layer, first : first + rows]
                place = (*DEVICE, np.float32, block.shape, block.ctypes.data)
                binding.bind_input(f"past_{name}_{layer}", *place)
                binding.bind_output(f"present_{name}_{layer}", *place)

    def move(self, source: int, target: int, filled: int) -> None:
        """Copies the first `filled` positions of one row over another's."""
        self._data[:, :, target, :, :filled] = self._data[:, :, source, :, :filled]


@dataclass(frozen=True, slots=True)
class OnnxNetwork:
    """The decoder's graph, for as many caches as are wanted."""

    session: Any
    facts: GraphFacts

    def cache(self, rows: int, capacity: int) -> DecoderGraph:
        """Room for `rows` clips of at most `capacity` positions."""
        return DecoderGraph(self.session, self.facts, rows, capacity)


class DecoderGraph:
    """Runs the graph for one batch of at most `rows` clips over one cache."""

    logits: NDArray[np.float32]
    """Of the last call, (rows, vocab), valid until the next."""

    def __init__(self, session: Any, facts: GraphFacts, rows: int, capacity: int) -> None:
        self._session = session
        self.rows = rows
        self.capacity = capacity
        self._cache = StaticCache(facts, rows, capacity)
        self._binding: Any = None
        self._bound = 0
        self.logits = self._logits = np.empty((rows, facts.vocab), np.float32)
        self._embeddings = np.empty((rows, 1, facts.hidden), np.float32)
        self._positions = np.zeros(rows, np.int32)
        self._last = np.zeros(rows, np.int64)
        self._total = np.zeros((), np.int32)

    def prefill(self, row: int, embeddings: NDArray[np.float32]) -> Choice:
        """A prompt (tokens, hidden) into row `row` -> the one token after its last position."""
        self.logits = self._logits[row : row + 1]
        for start in range(0, len(embeddings), PROMPT_SLICE):
            part = embeddings[None, start : start + PROMPT_SLICE]
            end = start + part.shape[1]
            inputs: Arrays = {
                "embeddings": part,
                "last": np.array([part.shape[1] - 1], np.int64),
                "seqlens_k": np.array([end - 1], np.int32),
                "total_sequence_length": np.array(end, np.int32),
            }
            self._session.run_with_iobinding(self._bind(inputs, row, self.logits))
        return likeliest(self.logits)

    def step(self, embeddings: NDArray[np.float32], positions: Sequence[int]) -> Choice:
        """The next token of the first rows, from this one's (rows, hidden) and the positions filled before it."""
        rows = len(positions)
        self._embeddings[:rows, 0] = embeddings
        self._positions[:rows] = positions
        self._total[()] = max(positions) + 1
        if rows != self._bound:
            self._binding, self._bound = self._bind_step(rows), rows
        self._session.run_with_iobinding(self._binding)
        self.logits = self._logits[:rows]
        return likeliest(self.logits)

    def move(self, source: int, target: int, filled: int) -> None:
        """Gives the place of row `target` to row `source`, of which `filled` positions are in use."""
        self._cache.move(source, target, filled)

    def _bind_step(self, rows: int) -> Any:
        """The buffers keep their addresses, so one binding serves all steps of as many rows."""
        inputs: Arrays = {
            "embeddings": self._embeddings[:rows],
            "last": self._last[:rows],
            "seqlens_k": self._positions[:rows],
            "total_sequence_length": self._total,
        }
        return self._bind(inputs, 0, self._logits[:rows])

    def _bind(self, inputs: Arrays, first: int, logits: NDArray[np.float32]) -> Any:
        """Inputs, the cache's rows from `first` on, and where the logits (rows, vocab) go. Keeps addresses only."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, *DEVICE, array.dtype.type, array.shape, array.ctypes.data)
        self._cache.bind(binding, first, len(logits))
        binding.bind_output("logits", *DEVICE, np.float32, logits.shape, logits.ctypes.data)
        return binding
