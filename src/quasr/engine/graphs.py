"""CUDA graphs of functions of tensors: hundreds of small kernels are launched as one.

A graph has fixed shapes, so inputs are padded to some few sizes. The first time that a size comes it runs plainly,
which compiles its kernels; the second time it is captured.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import partial
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakSet

import torch
import torch.nn.functional as F

from quasr.engine.packed import Packed, lay_out
from quasr.engine.streams import capture, finish_replays
from quasr.kernels import reference
from quasr.model.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from quasr.engine.fast import FastDecoder
    from quasr.engine.fast_audio import FastEncoder
    from quasr.kernels.dispatch import Kernels
    from quasr.kernels.state import CachePool

Launch: TypeAlias = "Callable[[Callable[..., Tensor]], Callable[..., Tensor]]"
"""What repeats a function: `Graphs`, or nothing but the function in tests."""

WINDOW_ROWS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80)
"""Full windows of tokens that the encoder is captured for; more run plainly, where launches are the smaller part."""

WINDOWS_A_ROW = 2
"""Windows for each of them: the last one of a clip is seldom full."""

FEW_TOKENS = tuple(range(128, 1025, 128))
"""Tokens of prompts that prefill is captured for. Beyond, each token reading the cache for itself is too much work."""

PACKED_TOKENS = (*FEW_TOKENS, *range(1280, 8193, 256))
"""The same where whole prompts are attended in a graph: up to the largest part that the fast engine forms."""

PACKED_PROMPTS = (4, 16, 64, 256)
"""Prompts in a graph. One that is empty costs next to nothing."""

MOST_GRAPHS = 16
"""Graphs of a function. What comes beyond runs plainly: to drop another would cost a wait and a capture each time."""


class GraphMemory:
    """The pool of memory of many graphs, of which one runs at a time: what one computes lies where others did.

    A result is therefore valid until the next call of any of them.
    """

    def __init__(self) -> None:
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._pool: torch.cuda._POOL_HANDLE | None = None

    def capture(self, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of `function`, and the output that it will write."""
        if not self._graphs:
            # A pool without graphs is gone.
            self._pool = torch.cuda.graph_pool_handle()
        graph, output = capture(function, self._pool)
        self._graphs.add(graph)
        return graph, output


class Graphs:
    """`function` from CUDA graphs, one for each shape of its inputs, which it may overwrite.

    A result is valid until the next call of what shares `memory`.
    """

    def __init__(self, function: Callable[..., Tensor], memory: GraphMemory) -> None:
        self._function = function
        self._memory = memory
        self._seen: set[tuple[torch.Size, ...]] = set()
        self._captured: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}
        self._inputs: dict[int, Tensor] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple(one.shape for one in inputs)
        if shapes not in self._captured:
            if shapes not in self._seen or len(self._captured) == MOST_GRAPHS:
                self._seen.add(shapes)
                return self._function(*inputs)
            self._captured[shapes] = self._capture(inputs)
        graph, static, output = self._captured[shapes]
        for own, given in zip(static, inputs, strict=True):
            own.copy_(given)
        graph.replay()
        return output

    def _capture(self, inputs: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        static = tuple(self._room(place, one) for place, one in enumerate(inputs))
        graph, output = self._memory.capture(partial(self._function, *static))
        return graph, static, output

    def _room(self, place: int, like: Tensor) -> Tensor:
        """Memory for one input, the same for all graphs that find it large enough. It lies outside of the pool, whose
        other graphs write where this one's inputs would be."""
        if place not in self._inputs or self._inputs[place].nbytes < like.nbytes:
            size = 1 << (like.nbytes - 1).bit_length()
            self._inputs[place] = torch.empty(size, dtype=torch.uint8, device=like.device)
        return self._inputs[place][: like.nbytes].view(like.dtype).view(like.shape)


class GraphedEncoder:
    """`FastEncoder.encode` with stem and layers padded to sizes that `launch` can repeat.

    Results are valid until the next call of what shares memory with it.
    """

    def __init__(self, encoder: FastEncoder, launch: Launch) -> None:
        self._encoder = encoder
        self._stem = launch(encoder.stem)
        self._transform = launch(encoder.transform)

    def encode(self, mel: Tensor, frames: Sequence[int]) -> Tensor:
        """As `AudioEncoder.encode`."""
        return self._encoder.run(mel, frames, self._stem_slice, self._layers)

    def _stem_slice(self, chunks: Tensor) -> Tensor:
        count = len(chunks)
        missing = self._encoder.slice - count
        # A pad of nothing is a copy too.
        return self._stem(F.pad(chunks, (0, 0, 0, 0, 0, missing)) if missing else chunks)[:count]

    def _layers(self, x: Tensor, starts: Tensor) -> Tensor:
        """The windows behind the last one are empty, and the tokens there belong to none."""
        config = self._encoder.config
        count, full = len(x), config.window_chunks * config.chunk_tokens
        rows = max(-(-count // full), -(-(len(starts) - 1) // WINDOWS_A_ROW))
        if rows > WINDOW_ROWS[-1]:
            return self._encoder.transform(x, starts)
        rows = WINDOW_ROWS[bisect_left(WINDOW_ROWS, rows)]
        x = F.pad(x, (0, 0, 0, rows * full - count))
        return self._transform(x, F.pad(starts, (0, rows * WINDOWS_A_ROW + 1 - len(starts)), value=count))[:count]


class GraphedPrefill:
    """`FastDecoder.prefill`, padded to sizes that `launch` can repeat; more tokens or prompts run plainly.

    Results are valid until the next call of what shares memory with it.
    """

    def __init__(self, decoder: FastDecoder, launch: Launch) -> None:
        self._decoder = decoder
        self._launch = launch
        self._cache: CachePool | None = None
        self._run: Callable[..., Tensor] | None = None

    def forget(self) -> None:
        """Drops the graphs, because the cache that they fill is to be replaced."""
        if self._cache is not None and self._cache.keys.is_cuda:
            finish_replays()
        self._cache = self._run = None

    def rows_for(self, lengths: Sequence[int]) -> int:
        """The rows that embeddings of such prompts are padded to: no more than they are where they run plainly."""
        if not self._fit(lengths):
            return self._decoder.rows_for(lengths)
        return self._sizes[bisect_left(self._sizes, sum(lengths))]

    def prefill(self, embeddings: Tensor, lengths: Sequence[int], offsets: Sequence[int], cache: CachePool) -> Tensor:
        """As `FastDecoder.prefill`; but embeddings that have `rows_for` rows already are overwritten, not copied."""
        if not self._fit(lengths):
            return self._decoder.prefill(embeddings, lengths, offsets, cache)
        if self._run is None or self._cache is not cache:
            self._cache, self._run = cache, self._launch(partial(self._fill, cache))
        tokens, prompts = self.rows_for(lengths), len(lengths)
        room = PACKED_PROMPTS[bisect_left(PACKED_PROMPTS, prompts)]
        layout = to_device(lay_out(lengths, offsets, tokens, room), embeddings.device)
        missing = tokens - len(embeddings)
        return self._run(F.pad(embeddings, (0, 0, 0, missing)) if missing else embeddings, layout)[:prompts]

    @property
    def _sizes(self) -> tuple[int, ...]:
        return PACKED_TOKENS if attends_whole(self._decoder.kernels) else FEW_TOKENS

    def _fit(self, lengths: Sequence[int]) -> bool:
        """Whether there is a graph for so much."""
        return sum(lengths) <= self._sizes[-1] and len(lengths) <= PACKED_PROMPTS[-1]

    def _fill(self, cache: CachePool, x: Tensor, layout: Tensor) -> Tensor:
        packed = Packed.read(layout, len(x))
        if attends_whole(self._decoder.kernels):
            return self._decoder.prefill_packed(x, packed, cache)
        return self._decoder.prefill_tokens(x, packed.places, cache)[packed.last]


def attends_whole(kernels: Kernels) -> bool:
    """Whether whole prompts can be attended in a graph, by what the device knows of them. The reference cannot."""
    return kernels.attend_prompts is not reference.attend_prompts
