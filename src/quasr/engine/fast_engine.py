"""The engine of GPUs: continuous batching. Clips join the running batch as others end; tokens stay on the device.

A step of the engine admits what fits, queues some decode steps and a look at their tokens, and reads the look before
that one: the device has work while the host reads. It runs on a CPU too, without graphs, which is how it is tested.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from quasr.engine import device as devices
from quasr.engine import mel_torch, scheduler
from quasr.engine.base import ClipResult, EngineStats, Reporting, Ticket, belongs, nan_error, run_group
from quasr.engine.fast import FastDecoder
from quasr.engine.fast_audio import LARGE_SLICE, FastEncoder
from quasr.engine.graphs import GraphedEncoder, GraphedPrefill, GraphMemory, Graphs
from quasr.engine.prompts import AudioSide, embed_prompts, prompt_length
from quasr.engine.row import Row
from quasr.engine.rows import Clip, Rows
from quasr.engine.spans import Spans
from quasr.engine.staging import Staging
from quasr.engine.steps import BUCKETS, Steps
from quasr.engine.streams import finish_replays, work_stream
from quasr.engine.torch_engine import memory_advice, network_info
from quasr.errors import OptionError
from quasr.kernels import dispatch
from quasr.model.encoder import STEM_SLICE
from quasr.model.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from quasr.engine.base import ClipRequest
    from quasr.engine.device import Placement
    from quasr.engine.rows import Look, Seen
    from quasr.kernels.state import CachePool
    from quasr.model.asr import Qwen3ASR

PACE = 4
"""Decode steps between two looks. A row that has ended stays idle until the host knows, one or two looks later."""

CALM_PACE = 8
"""The same for few rows, where a look costs more than idle steps."""

CALM_ROWS = 4

AHEAD_SHARE, MOST_AHEAD = 2, 16
"""Clips whose prompts are computed before there is a row for them: half as many as rows, and no more than this. They
come in larger groups so, each of which reads all weights; and a row that is free goes on at once."""

POSITIONS_MULTIPLE = 64
"""The cache grows in such steps, and at least by half: tensors and graphs are made anew each time."""

PREFILL_SHARE, LEAST_PREFILL, MOST_PREFILL = 8, 2048, 8192
"""Positions that are encoded and prefilled at once: an eighth of the cache, within bounds."""

FIRST_PREFILL = 2048
"""The same, at most, where the device has nothing to do meanwhile: its samples are copied and its kernels launched in
a fraction of the time, and the next part's while it is computed."""

FREE_SHARE = 0.8
"""Of the device's free memory, what the cache may take; the rest is for activations."""

USUAL_POSITIONS, WAITING = 850, 8
"""Cache positions of a piece of 30 s with its budget; and clips that are at hand when some end."""

UNKNOWN_MEMORY = 4 << 30
"""Bytes that are taken for free on systems that do not say."""


@dataclass(frozen=True, slots=True)
class FastOptions:
    """rows: clips that are decoded together; cache_bytes: most memory of keys and values, None: most of what is free;
    graphs: CUDA graphs, where device and kernels allow them. Raises OptionError for rows that no graph has."""

    rows: int = BUCKETS[-1]
    cache_bytes: int | None = None
    graphs: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= BUCKETS[-1]:
            raise OptionError(f"{self.rows} rows: a batch has 1 to {BUCKETS[-1]} rows")


class FastEngine(Reporting):
    """Runs `model`, which lies on `placement.device` in `placement.dtype`. One caller at a time.

    `scheme` is the name of the recipe that its weights are quantised by. Raises OptionError for layers that the fast
    decoder cannot run (`quasr.engine.fast.refusal`).
    """

    _scheduler: scheduler.Scheduler
    _rows: Rows
    _clips: dict[int, Clip]
    _starting: list[Clip]
    _finished: list[tuple[Ticket, ClipResult]]
    _looks: deque[Look]

    def __init__(
        self,
        model: Qwen3ASR,
        stop_ids: Collection[int],
        placement: Placement,
        scheme: str = "none",
        options: FastOptions | None = None,
    ) -> None:
        self._options = options or FastOptions()
        self._ahead = min(self._options.rows // AHEAD_SHARE, MOST_AHEAD)
        self._device = placement.device
        self._stop_ids = frozenset(stop_ids)
        kernels = dispatch.choose(placement.device, placement.dtype)
        graphs = self._options.graphs and kernels.capturable and placement.device.type == "cuda"
        self._model: Qwen3ASR | None = model
        self._decoder = FastDecoder.from_model(model.decoder, kernels)
        self._steps = Steps(self._decoder, graphs=graphs)
        # Their graphs hold memory of their own, for which a plan has no room.
        roomy = graphs and self._options.cache_bytes is None
        # One memory: a clip's audio vectors are in its prompt before the prompt is computed, and that prompt's first
        # token is chosen before the next clip is encoded.
        launch = partial(Graphs, memory=GraphMemory())
        self._prefill = GraphedPrefill(self._decoder, launch) if roomy else self._decoder
        encoder = FastEncoder.from_model(model.encoder, kernels, LARGE_SLICE if roomy else STEM_SLICE)
        encode = GraphedEncoder(encoder, launch).encode if roomy else encoder.encode
        self._audio = AudioSide(encoder.config, encode, mel_torch.LARGE_SLICE if roomy else mel_torch.SLICE_FRAMES)
        self._staging = Staging.on(placement.device)
        self._stats = EngineStats()
        self._spans = Spans(self._stats, placement.device)
        self._submitted = 0
        self._cache: CachePool | None = None
        self._most = self._most_positions()
        self._forget_clips()
        _leave_stream(placement.device)
        how = f"{kernels.name} kernels ({kernels.reason}), {'CUDA graphs' if graphs else 'no CUDA graphs'}"
        self._info = replace(
            network_info("fast", model, placement, scheme),
            reasons=(*placement.reasons, how),
            in_flight=min(self._options.rows + self._ahead, self._most // USUAL_POSITIONS) + WAITING,
        )

    def submit(self, request: ClipRequest, group: Hashable = 0) -> Ticket:
        """As `Engine.submit`. Raises ResourceError where prompt and budget do not fit into the cache alone."""
        prompt = prompt_length(self._network.config.audio, request)
        ticket = Ticket(group, self._submitted)
        place = scheduler.Ticket(group, ticket.number, prompt, max(1, request.max_new_tokens))
        self._scheduler.submit(place, time.monotonic())
        self._submitted += 1
        self._clips[ticket.number] = Clip(ticket, place, request, Row.of(request, prompt), self._usable_draft(request))
        return ticket

    def step(self) -> list[tuple[Ticket, ClipResult]]:
        """As `Engine.step`."""
        finished, self._finished = self._finished, []
        if self._clips:
            with self._working():
                self._admit()
                queued = self._queue_steps()
                finished += self._read_looks(wait_for_all=not queued)
            self._spans.collect()
        return finished

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        """As `Engine.run`. Other clips go on meanwhile; `step` gives their results later."""
        results, self._finished = run_group(self, requests)
        return results

    def cancel(self, what: Hashable) -> None:
        """As `Engine.cancel`."""
        self._finished = [one for one in self._finished if not belongs(one[0], what)]
        gone = [clip for clip in self._clips.values() if belongs(clip.ticket, what)]
        for clip in gone:
            clip.over = True
            del self._clips[clip.ticket.number]
            self._scheduler.cancel(clip.place, time.monotonic())
        self._starting = [clip for clip in self._starting if not clip.over]
        if gone:
            with _current(self._device), torch.inference_mode():
                self._rows.drop()

    def close(self) -> None:
        """As `Engine.close`; `submit` raises RuntimeError afterwards, and a second `close` does nothing."""
        if self._model is None:
            return
        with _current(self._device):
            if self._device.type == "cuda":
                finish_replays()
            self._staging.close()
            self._model = None
            self._forget_clips()
            self._cache = None
            if isinstance(self._prefill, GraphedPrefill):
                # It and its graphs hold each other, and with them the weights.
                self._prefill.forget()
            del self._decoder, self._steps, self._rows, self._prefill, self._audio
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    @property
    def _network(self) -> Qwen3ASR:
        if self._model is None:
            raise RuntimeError("the engine is closed")
        return self._model

    def _forget_clips(self) -> None:
        self._scheduler = scheduler.Scheduler(self._most, self._options.rows + self._ahead)
        self._clips, self._starting, self._finished, self._looks = {}, [], [], deque()
        self._rows = Rows(self._options.rows, self._ahead, self._stop_ids, self._device)
        self._steps.forget()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """On this engine's device. An error ends all clips, because nobody knows what it left half done."""
        requests = [clip.request for clip in self._clips.values()]
        with _current(self._device):
            try:
                with torch.inference_mode(), memory_advice(requests, self._device):
                    yield
            except BaseException:
                self._forget_clips()
                raise

    def _usable_draft(self, request: ClipRequest) -> tuple[int, ...]:
        """What of a draft can be right: it ends before a stop token, or one that is not in the vocabulary."""
        size = self._network.config.text.vocab_size
        ends = (i for i, token in enumerate(request.draft) if token in self._stop_ids or not 0 <= token < size)
        return request.draft[: min(next(ends, len(request.draft)), request.max_new_tokens)]

    def _admit(self) -> None:
        """Encodes and prefills the clips that fit now, those ahead of rows too, once a row has nothing to do or a group
        has no clip here, whose first then moves up before others (`Rows.drop`)."""
        wanted = self._rows.free or self._scheduler.starving
        for admission in self._scheduler.admit(time.monotonic()) if wanted else ():
            clip = self._clips[admission.ticket.index]
            clip.offset = admission.offset
            self._starting.append(clip)
        if self._starting and self._fit_cache():
            starting, self._starting = self._starting, []
            self._fit_rows(starting)
            parts = list(self._parts(starting))
            with closing(self._staging.send([[clip.request.samples for clip in part] for part in parts])) as samples:
                for part in parts:
                    self._start(part, samples)

    def _parts(self, clips: Sequence[Clip]) -> Iterator[list[Clip]]:
        """Clips whose prompts are computed together: one, or as many as the share of the cache allows."""
        assert self._cache is not None
        most = min(max(self._cache.positions // PREFILL_SHARE, LEAST_PREFILL), MOST_PREFILL)
        # Where nothing is running the device waits for the first part.
        first = min(most // 2, FIRST_PREFILL) if not self._rows.clips else most
        for part in even_parts([clip.place.prompt for clip in clips], most, first):
            # Those with a draft come last, because they may begin with several tokens.
            yield sorted((clips[index] for index in part), key=lambda clip: len(clip.draft))

    def _start(self, clips: Sequence[Clip], samples: Iterator[Tensor]) -> None:
        """Puts clips, whose samples come next, into rows: with their first token, or more where there is a draft."""
        assert self._cache is not None
        lengths, offsets = [clip.place.prompt for clip in clips], [clip.begin for clip in clips]
        with self._spans.measure("encode_seconds"):
            rows = self._prefill.rows_for(lengths)
            x = embed_prompts(self._audio, self._decoder, [clip.request for clip in clips], next(samples), rows)
        with self._spans.measure("prefill_seconds"):
            self._rows.admit(clips, self._decoder.choose(self._prefill.prefill(x, lengths, offsets, self._cache)))
            self._verify([clip for clip in clips if len(clip.draft) > 1 and clip.place.budget > 1])

    def _verify(self, clips: Sequence[Clip]) -> None:
        """Checks the drafts of the newest clips. Their first token is known; wrong guesses fill up the shorter ones."""
        if not clips:
            return
        assert self._cache is not None
        longest = max(len(clip.draft) for clip in clips) - 1
        guesses = [token for clip in clips for token in (*clip.draft[1:], *[0] * (longest - len(clip.draft) + 1))]
        drafts = to_device(guesses, self._device).view(len(clips), -1)
        state = self._rows.view(len(clips), first=len(self._rows.clips) - len(clips))
        self._decoder.verify(state, drafts, self._cache)
        self._rows.count_draft(clips, longest + 1)

    def _queue_steps(self) -> bool:
        """Queues decode steps and a look; False where nothing is left to do but to read."""
        rows = self._rows
        if not rows.clips:
            return False
        assert self._cache is not None
        pace = CALM_PACE if len(rows.decoding) <= CALM_ROWS else PACE
        count = min(pace, max(clip.left for clip in rows.decoding))
        if count <= 0 and self._looks:
            return False
        with self._spans.measure("generate_seconds"):
            if count > 0:
                busy = min(self._steps.rows_for(len(rows.decoding)), self._options.rows)
                self._steps.run(rows.view(busy), self._cache, count)
                rows.count_steps(count)
            self._looks.append(rows.look())
        return True

    def _read_looks(self, *, wait_for_all: bool) -> list[tuple[Ticket, ClipResult]]:
        """What has ended in the looks that are due. On a GPU the newest one waits, so that the device has work."""
        newest = 1 if self._device.type == "cuda" and not wait_for_all else 0
        finished = []
        while len(self._looks) > newest:
            for clip, seen in self._looks.popleft().read():
                if not clip.over and self._hear(clip, seen):
                    finished.append((clip.ticket, clip.row.result()))
        self._rows.drop()
        return finished

    def _hear(self, clip: Clip, seen: Seen) -> bool:
        """Takes the new tokens of a clip, and ends it where they do: then True."""
        new = seen.cursor - clip.heard
        # A row that met a stop token at once has no token, but a first log-probability that may be NaN.
        if not np.isfinite(seen.logprobs[: max(new, 1 - clip.heard)]).all():
            raise nan_error(self._info.dtype)
        clip.heard = seen.cursor
        clip.sure = max(clip.sure, clip.sure - seen.sure + seen.cursor)
        for token, logprob in zip(seen.tokens[:new], seen.logprobs[:new], strict=True):
            clip.row.take(token, logprob, frozenset())
            if clip.row.finish_reason:
                break
        if seen.finished and not clip.row.finish_reason:
            clip.row.finish_reason = "stop"
        if clip.row.finish_reason:
            self._end(clip)
        return clip.over

    def _end(self, clip: Clip) -> None:
        clip.over = True
        del self._clips[clip.ticket.number]
        self._scheduler.finish(clip.place)
        self._stats.tokens += len(clip.row.tokens)

    def _fit_rows(self, clips: Sequence[Clip]) -> None:
        budget = max(clip.place.budget for clip in clips)
        if budget > self._rows.capacity:
            self._steps.forget()
            self._rows.grow(1 << (budget - 1).bit_length())

    def _fit_cache(self) -> bool:
        """Whether the cache reaches as far as the starting clips do, after growing where it must and can."""
        needed = max(clip.begin + clip.place.positions for clip in self._starting)
        have = 0 if self._cache is None else self._cache.positions
        if needed <= have:
            return True
        demand = sum(clip.place.positions for clip in self._clips.values())
        wanted = max(needed, min(demand, self._most), have * 3 // 2)
        size = min(-(-wanted // POSITIONS_MULTIPLE) * POSITIONS_MULTIPLE, max(needed, self._most))
        if self._rows.clips and size * self._position_bytes > _free_bytes(self._device):
            return False
        self._grow_cache(size)
        return True

    def _grow_cache(self, positions: int) -> None:
        """A larger cache. Where clips are running the old one is copied, and both are held for that time."""
        self._steps.forget()
        if isinstance(self._prefill, GraphedPrefill):
            self._prefill.forget()
        kept = [self._cache] if self._cache and self._rows.clips else []
        self._cache = None
        grown = self._cache = self._decoder.allocate_cache(positions)
        for old in kept:
            grown.keys[:, :, : old.positions] = old.keys
            grown.values[:, :, : old.positions] = old.values

    @property
    def _position_bytes(self) -> int:
        """Keys and values of one position in all layers."""
        text, item = self._network.config.text, self._decoder.norm.weight.dtype.itemsize
        return 2 * text.layers * text.kv_heads * text.head_dim * item

    def _most_positions(self) -> int:
        """Positions that the cache may ever have."""
        limit = self._options.cache_bytes or round(FREE_SHARE * _free_bytes(self._device))
        return max(1, limit // self._position_bytes)


def even_parts(sizes: Sequence[int], most: int, first: int) -> Iterator[range]:
    """Neighbours that come to at most `most` together, or one that is larger: about as few parts as that takes, of
    about the same size, because every part reads all weights. Where there are several, one of at most `first`, or of
    one, comes before them."""
    begin = _within(sizes, first) if len(sizes) > 1 and sum(sizes) > most > first else 0
    if begin:
        yield range(begin)
    fair = sum(sizes[begin:]) / max(1, -(-sum(sizes[begin:]) // most))
    inside, before, number = 0, 0, 1
    for index in range(begin, len(sizes)):
        size = sizes[index]
        if inside and (inside + size > most or before + size / 2 > number * fair):
            yield range(begin, index)
            begin, inside, number = index, 0, number + 1
        inside, before = inside + size, before + size
    yield range(begin, len(sizes))


def _within(sizes: Sequence[int], most: int) -> int:
    """How many of the first come to at most `most` together, one at least."""
    return max(1, bisect_right(list(accumulate(sizes)), most))


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one that kernels are launched on, in its work stream, and that is waited for before graphs are
    dropped."""
    return torch.cuda.stream(work_stream(device.index or 0)) if device.type == "cuda" else nullcontext()


def _leave_stream(device: torch.device) -> None:
    """Waits for what was queued on the caller's stream, and returns what was freed there, which serves no other."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _free_bytes(device: torch.device) -> int:
    """Memory that new tensors can have: what the system gives, and what torch holds without using it."""
    if device.type != "cuda":
        return next((memory.free for memory in devices.memory() if memory.device == "cpu"), UNKNOWN_MEMORY)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
