"""CUDA graphs of functions of tensors: hundreds of small kernels are launched as one.

A graph has fixed shapes, so inputs are padded to some few sizes. The first time that a size comes it runs plainly,
which compiles its kernels; the second time it is captured.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

from quasr.engine.steps import finish_replays
from quasr.kernels.state import Places
from quasr.model.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from quasr.engine.fast import FastDecoder
    from quasr.engine.fast_audio import FastEncoder
    from quasr.kernels.state import CachePool

Launch: TypeAlias = "Callable[[Callable[..., Tensor]], Callable[..., Tensor]]"
"""What repeats a function: `Graphs`, or nothing but the function in tests."""

WINDOW_ROWS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80)
"""Full windows of tokens that the encoder is captured for; more run plainly, where launches are the smaller part."""

WINDOWS_A_ROW = 2
"""Windows for each of them: the last one of a clip is seldom full."""

PROMPT_TOKENS = (128, 256, 384, 512, 640, 768, 896, 1024)
"""Tokens of prompts that prefill is captured for. Beyond, each token reading the cache for itself is too much work."""


class Graphs:
    """`function` from CUDA graphs, one for each shape of its inputs. They share one pool of memory.

    A result is valid until the next call.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._seen: set[tuple[torch.Size, ...]] = set()
        self._captured: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}
        self._memory: torch.cuda._POOL_HANDLE | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple(one.shape for one in inputs)
        if shapes not in self._captured:
            if shapes not in self._seen:
                self._seen.add(shapes)
                return self._function(*inputs)
            self._captured[shapes] = self._capture(inputs)
        graph, static, output = self._captured[shapes]
        for own, given in zip(static, inputs, strict=True):
            own.copy_(given)
        graph.replay()
        return output

    def _capture(self, inputs: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        static = tuple(torch.empty_like(one) for one in inputs)
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            output = self._function(*static)
        return graph, static, output


class GraphedEncoder:
    """`FastEncoder.encode` with stem and layers padded to sizes that `launch` can repeat."""

    def __init__(self, encoder: FastEncoder, launch: Launch = Graphs) -> None:
        self._encoder = encoder
        self._stem = launch(encoder.stem)
        self._transform = launch(encoder.transform)

    def encode(self, mel: Tensor, frames: Sequence[int]) -> Tensor:
        """As `AudioEncoder.encode`."""
        return self._encoder.run(mel, frames, self._stem_slice, self._layers)

    def _stem_slice(self, chunks: Tensor) -> Tensor:
        count = len(chunks)
        return self._stem(F.pad(chunks, (0, 0, 0, 0, 0, self._encoder.slice - count)))[:count]

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
    """`FastDecoder.prefill` of few tokens, padded to sizes that `launch` can repeat; more tokens run plainly."""

    def __init__(self, decoder: FastDecoder, launch: Launch = Graphs) -> None:
        self._decoder = decoder
        self._launch = launch
        self._cache: CachePool | None = None
        self._run: Callable[..., Tensor] | None = None

    def forget(self) -> None:
        """Drops the graphs, because the cache that they fill is to be replaced."""
        if self._cache is not None and self._cache.keys.is_cuda:
            finish_replays()
        self._cache = self._run = None

    def prefill(self, embeddings: Tensor, lengths: Sequence[int], offsets: Sequence[int], cache: CachePool) -> Tensor:
        """As `FastDecoder.prefill`."""
        count = len(embeddings)
        if count > PROMPT_TOKENS[-1]:
            return self._decoder.prefill(embeddings, lengths, offsets, cache)
        if self._run is None or self._cache is not cache:
            self._cache, self._run = cache, self._launch(partial(self._fill, cache))
        missing = PROMPT_TOKENS[bisect_left(PROMPT_TOKENS, count)] - count
        positions = np.concatenate([np.arange(length) for length in (*lengths, missing)])
        begins = np.repeat([*offsets, 0], [*lengths, missing])
        idle = np.arange(count + missing) >= count
        places = (to_device(one, embeddings.device) for one in (begins, positions, idle))
        x = self._run(F.pad(embeddings, (0, 0, 0, missing)), *places)
        return x[to_device(np.cumsum(lengths) - 1, embeddings.device)]

    def _fill(self, cache: CachePool, x: Tensor, begins: Tensor, positions: Tensor, idle: Tensor) -> Tensor:
        return self._decoder.prefill_tokens(x, Places(begins, positions, idle), cache)
