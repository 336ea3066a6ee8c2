"""The network in torch behind the engine protocol: a ragged batch, a static cache, greedy decoding."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import torch

from quasr.audio.mel import log_mel
from quasr.engine.base import (
    BatchQueue,
    ClipRequest,
    ClipResult,
    EngineInfo,
    EngineStats,
    Reporting,
    memory_error,
    nan_error,
)
from quasr.engine.row import Row
from quasr.model.decoder import KVCache

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from torch import Tensor

    from quasr.engine.device import Placement
    from quasr.model.asr import Qwen3ASR

DROP_AT = 4
"""Finished rows leave once they are a quarter of the batch: each departure copies the rest of the cache."""


def network_info(name: str, model: Qwen3ASR, placement: Placement, scheme: str) -> EngineInfo:
    """What is to be told of an engine `name` that runs `model` where `placement` says."""
    return EngineInfo(
        name=name,
        device=str(placement.device),
        dtype=placement.dtype_name,
        weight_bytes=sum(weight.nbytes for weight in chain(model.parameters(), model.buffers())),
        reasons=placement.reasons,
        scheme=scheme,
    )


class TorchEngine(Reporting, BatchQueue):
    """Runs `model`, which already lies on `placement.device` in `placement.dtype`. One caller at a time.

    `scheme` is the name of the recipe that its weights are quantised by.
    """

    def __init__(self, model: Qwen3ASR, stop_ids: Collection[int], placement: Placement, scheme: str = "none") -> None:
        super().__init__()
        self._model: Qwen3ASR | None = model
        self._stop_ids = frozenset(stop_ids)
        self._placement = placement
        self._stats = EngineStats()
        self._info = network_info("torch", model, placement, scheme)

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        """Decodes all clips as one batch, greedily; results in the order of `requests`.

        Raises ResourceError when memory runs out and ModelError when the network computes NaN.
        """
        if not requests:
            return []
        with torch.inference_mode(), memory_advice(requests, self._placement.device):
            embeddings, lengths = self._embed(requests)
            rows = [Row.of(request, length) for request, length in zip(requests, lengths, strict=True)]
            self._decode(embeddings, rows)
        self._stats.tokens += sum(len(row.tokens) for row in rows)
        return [row.result() for row in rows]

    def close(self) -> None:
        """Gives the memory back. `run` raises RuntimeError afterwards."""
        self._model = None
        if self._placement.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _network(self) -> Qwen3ASR:
        if self._model is None:
            raise RuntimeError("the engine is closed")
        return self._model

    def _embed(self, requests: Sequence[ClipRequest]) -> tuple[Tensor, list[int]]:
        """Encodes the audio and lays out the prompts: (batch, longest, hidden) and the true lengths."""
        started = self._clock()
        device = self._placement.device
        audio = self._network.encode([self._mel(request).to(device) for request in requests])
        prompts = self._network.embed_prompts(
            audio,
            [torch.tensor(request.prefix, dtype=torch.long, device=device) for request in requests],
            [torch.tensor(request.suffix, dtype=torch.long, device=device) for request in requests],
        )
        self._stats.encode_seconds += self._clock() - started
        return prompts

    def _mel(self, request: ClipRequest) -> Tensor:
        return torch.from_numpy(log_mel(request.samples, self._network.config.audio.mel_bins))

    def _decode(self, embeddings: Tensor, rows: list[Row]) -> None:
        """Prefill, then a token a row and step until every row is finished."""
        started = self._clock()
        capacity = max(row.position + row.budget for row in rows)
        cache = KVCache.allocate(self._network.config.text, len(rows), capacity, embeddings.dtype, embeddings.device)
        logits = self._network.prefill(embeddings, [row.position for row in rows], cache)
        tokens = self._take(logits, rows)
        prefilled = self._clock()
        self._stats.prefill_seconds += prefilled - started
        while any(row.finish_reason is None for row in rows):
            rows, tokens, cache = _drop_finished(rows, tokens, cache)
            tokens = self._step(rows, tokens, cache)
        self._stats.generate_seconds += self._clock() - prefilled

    def _step(self, rows: Sequence[Row], tokens: Tensor, cache: KVCache) -> Tensor:
        active = [row for row in rows if row.finish_reason is None]
        lengths = torch.tensor([row.position for row in rows], device=tokens.device)
        logits = self._network.step(tokens, lengths, max(row.position for row in active), cache)
        for row in active:
            row.position += 1
        return self._take(logits, rows)

    def _take(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        """Gives each unfinished row its likeliest token, with log softmax(logits) in fp32; returns all tokens."""
        wide = logits.float()
        best, tokens = wide.max(dim=-1)
        logprobs = (best - wide.logsumexp(dim=-1)).tolist()
        if not all(map(math.isfinite, logprobs)):
            raise nan_error(self._info.dtype)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs, strict=True):
            if row.finish_reason is None:
                row.take(token, logprob, self._stop_ids)
        return tokens

    def _clock(self) -> float:
        if self._placement.device.type == "cuda":
            torch.cuda.synchronize(self._placement.device)
        return time.perf_counter()


def _drop_finished(rows: list[Row], tokens: Tensor, cache: KVCache) -> tuple[list[Row], Tensor, KVCache]:
    """Takes the finished rows out of the batch where that pays.

    A finished row that stays recomputes its last position, inside its own part of the cache, and is ignored.
    """
    keep = [index for index, row in enumerate(rows) if row.finish_reason is None]
    if (len(rows) - len(keep)) * DROP_AT < len(rows) or len(keep) == len(rows):
        return rows, tokens, cache
    chosen = torch.tensor(keep, device=tokens.device)
    return [rows[index] for index in keep], tokens[chosen], cache.keep(chosen)


@contextmanager
def memory_advice(requests: Sequence[ClipRequest], device: torch.device) -> Iterator[None]:
    """Turns torch's two ways of running out of memory into one line of advice."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise memory_error(str(device), requests) from error
