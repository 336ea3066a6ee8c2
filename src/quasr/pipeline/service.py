"""A speech recogniser for long-running programs: loads when asked, unloads when idle, and always answers.

One thread owns the model. Callers of any number put their clips into its queue; what waits together is
decoded together, and every caller gets the answer to his own clip.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import math
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from quasr.audio.decode import log_notice
from quasr.audio.source import Kind, kind_of, name_of
from quasr.errors import AudioError, OptionError, QuasrError
from quasr.pipeline.transcriber import Transcriber, load
from quasr.types import TranscribeOptions

if TYPE_CHECKING:
    from pathlib import Path

    from quasr.audio.source import AudioInput
    from quasr.types import Transcript

GATHER_SECONDS = 0.005
"""How long a batch waits for more clips: far less than decoding one takes, enough for callers that start together."""

CLOSED = "the service is closed: open a new one"

FORKED = "the service was in use before this process was forked from it: open a new one here, or spawn processes"
"""Threads stay behind in a fork: nobody would ever answer, and a lock may be held for good."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class ServiceResult(Mapping[str, Any]):
    """One answer: attributes, a mapping and `to_dict()` with the same five entries.

    `audio_duration` is in seconds, `language` an English name. On failure `error` is one line, the others are empty.
    """

    success: bool
    text: str = ""
    audio_duration: float = 0.0
    language: str = ""
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, ready for JSON."""
        return asdict(self)

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    def __iter__(self) -> Iterator[str]:
        return (entry.name for entry in fields(self))

    def __len__(self) -> int:
        return len(fields(self))


class SpeechService:
    """Transcribes files and bytes from any number of threads, and never raises for what a user sent.

    with SpeechService("demo", idle_seconds=300) as service:
        print(service.transcribe_file("talk.mp3")["text"])

    The model is loaded by the first call and given back after `idle_seconds` without one (None: never), by `unload`
    and by `close`. Up to `batch_size` clips with the same options are decoded together. `load_options` go to
    `quasr.load`. Audio, options or a model that cannot be used, and faults of our own, make a result with `success`
    False; the latter are logged with their traceback. Raises OptionError for a senseless argument of this constructor.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        compute_type: str = "auto",
        device: str = "auto",
        idle_seconds: float | None = None,
        batch_size: int = 8,
        **load_options: Any,
    ) -> None:
        if idle_seconds is not None and not 0 < idle_seconds < math.inf:
            raise OptionError(f"idle_seconds is {idle_seconds}: it must be a positive number, or None for never")
        if batch_size < 1:
            raise OptionError(f"batch_size is {batch_size}: it must be at least 1")
        loading = partial(load, model, compute_type=compute_type, device=device, batch_size=batch_size, **load_options)
        self._worker = _Worker(loading, batch_size, idle_seconds)
        # The worker's thread knows the worker only, so a service that nobody holds any more ends it.
        weakref.finalize(self, self._worker.close)

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._worker.loaded

    def transcribe_file(self, path: str | os.PathLike[str], **overrides: Any) -> ServiceResult:
        """Transcribes an audio or video file; `overrides` are fields of TranscribeOptions, such as `language`."""
        return self._submit(path, Kind.PATH, overrides).result()

    def transcribe_bytes(self, data: bytes | bytearray | memoryview, **overrides: Any) -> ServiceResult:
        """Transcribes the bytes of an audio or video file."""
        return self._submit(data, Kind.BYTES, overrides).result()

    async def atranscribe_file(self, path: str | os.PathLike[str], **overrides: Any) -> ServiceResult:
        """As `transcribe_file`; a task that is cancelled while its clip waits takes the clip back."""
        return await asyncio.wrap_future(self._submit(path, Kind.PATH, overrides))

    async def atranscribe_bytes(self, data: bytes | bytearray | memoryview, **overrides: Any) -> ServiceResult:
        """As `transcribe_bytes`; a task that is cancelled while its clip waits takes the clip back."""
        return await asyncio.wrap_future(self._submit(data, Kind.BYTES, overrides))

    def unload(self) -> None:
        """Gives the model's memory back after the batch in hand; the next call loads it again."""
        self._worker.unload()

    def close(self) -> None:
        """Ends the service: the batch in hand is the last, callers still waiting are told that it is closed."""
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, source: AudioInput, wanted: Kind, overrides: dict[str, Any]) -> Future[ServiceResult]:
        request = _Request(source, overrides)
        try:
            _expect(source, wanted)
            _expect_options(overrides)
        except OptionError as error:
            request.answer.set_result(ServiceResult(success=False, error=str(error)))
        else:
            self._worker.submit(request)
        return request.answer


@dataclass(slots=True, eq=False)
class _Request:
    source: AudioInput
    overrides: dict[str, Any]
    answer: Future[ServiceResult] = field(default_factory=Future)

    def fail(self, error: str) -> None:
        self.answer.set_result(ServiceResult(success=False, error=error))


class _ClosedError(Exception):
    """Leaves a decode that has lost its reader."""


class _Worker:
    """The queue, the thread that empties it, and the model, which only that thread touches."""

    def __init__(self, loading: Callable[[], Transcriber], batch_size: int, idle_seconds: float | None) -> None:
        self._loading = loading
        self._batch_size = batch_size
        self._idle_seconds = idle_seconds
        self._transcriber: Transcriber | None = None
        self._at_hand: list[_Request] = []
        self._last = False
        # Below: shared with the callers, under the lock of `changed`.
        self._changed = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._unloads: list[Future[None]] = []
        self._closed = False
        self._thread: threading.Thread | None = None
        self._home: int | None = None

    @property
    def _forked(self) -> bool:
        """Whether the thread is another process's."""
        return self._home not in (None, os.getpid())

    @property
    def loaded(self) -> bool:
        return self._transcriber is not None

    def submit(self, request: _Request) -> None:
        if self._forked:
            request.fail(FORKED)
            return
        with self._changed:
            if self._closed:
                request.fail(CLOSED)
                return
            self._waiting.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="quasr-service", daemon=True)
                self._thread.start()
                self._home = os.getpid()
            self._changed.notify_all()

    def unload(self) -> None:
        if self._forked:
            return
        done: Future[None] = Future()
        with self._changed:
            if self._thread is None:  # no thread, no model
                return
            self._unloads.append(done)
            self._changed.notify_all()
        done.result()

    def close(self) -> None:
        if self._forked:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        # The garbage collector may call this anywhere, in that thread too.
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        reason = CLOSED
        try:
            while not self._closed:
                self._step()
        except _ClosedError:
            _log.debug("closed while decoding")
        except BaseException as error:  # whatever it was, callers wait for an answer
            reason = _line(error)
        finally:
            self._end(reason)

    def _step(self) -> None:
        batch = self._next()
        if batch is None:
            self._release()
        else:
            self._answer(batch)

    def _next(self) -> list[_Request] | None:
        """Waits for work: clips with equal options, or None where the model is to go: idle, asked to, or the end."""
        with self._changed:
            idle = None if self._transcriber is None else self._idle_seconds
            self._changed.wait_for(lambda: self._waiting or self._unloads or self._closed, idle)
            if self._waiting and not self._unloads:
                self._changed.wait_for(lambda: len(self._waiting) >= self._batch_size or self._closed, GATHER_SECONDS)
            if self._unloads or self._closed or not self._waiting:
                return None
            return self._take()

    def _take(self) -> list[_Request]:
        """The oldest waiting clip and those with equal options, less those whose callers have left."""
        wanted = self._waiting[0].overrides
        batch = [request for request in self._waiting if _equal(request.overrides, wanted)][: self._batch_size]
        self._waiting = deque(request for request in self._waiting if request not in batch)
        return [request for request in batch if request.answer.set_running_or_notify_cancel()]

    def _answer(self, batch: list[_Request]) -> None:
        self._at_hand = batch
        failure = self._load() if batch else None
        if failure is None:
            self._decode(batch)
        else:
            self._give_up(failure)
        self._at_hand = []

    def _load(self) -> str | None:
        """Loads the model unless it is there; the error's line where that fails."""
        if self._transcriber is None:
            try:
                self._transcriber = self._loading()
            except Exception as error:
                return _line(error)
        return None

    def _decode(self, batch: list[_Request]) -> None:
        """Answers a batch. One that fails as a whole is tried clip by clip: only the clip at fault is to fail."""
        failure = self._attempt(batch) if batch else None
        if failure is None:
            return
        for request in [request for request in batch if not request.answer.done()]:
            if len(batch) == 1:
                request.fail(failure)
            else:
                self._decode([request])

    def _attempt(self, batch: list[_Request]) -> str | None:
        """Answers as many of `batch` as can be; the error's line where that was not all."""
        assert self._transcriber is not None
        try:
            sources = [request.source for request in batch]
            results = self._transcriber.transcribe_batch(sources, progress=self._go_on, **batch[0].overrides)
            for request, result in zip(batch, results, strict=True):
                request.answer.set_result(_result(result))
        except _ClosedError:
            raise
        except Exception as error:
            return _line(error)
        return None

    def _go_on(self, _seconds: float) -> None:
        """Called after every batch. Closing lets the batch in hand be answered and stops before the one after it."""
        if self._last:
            raise _ClosedError
        self._last = self._closed

    def _give_up(self, reason: str) -> None:
        """Answers all who wait, and those at hand that have no answer."""
        with self._changed:
            left = [request for request in self._waiting if request.answer.set_running_or_notify_cancel()]
            self._waiting.clear()
        for request in [*self._at_hand, *left]:
            if not request.answer.done():
                request.fail(reason)

    def _release(self) -> None:
        """Gives the model's memory back, and tells those who asked for it."""
        with self._changed:
            asked, self._unloads = self._unloads, []
        try:
            if self._transcriber is not None:
                self._transcriber.close()
        finally:
            self._transcriber = None
            give_back_memory()
            for done in asked:
                done.set_result(None)

    def _end(self, reason: str) -> None:
        """Leaves nobody waiting. After a crash the next caller starts a new thread."""
        try:
            self._release()
        finally:
            with self._changed:
                self._give_up(reason)
                self._at_hand = []
                self._thread = self._home = None
                for done in self._unloads:
                    done.set_result(None)
                self._unloads = []


def give_back_memory() -> None:
    """Returns what is free to the device and the system: cycles, what torch keeps of the device's memory (32 MiB for
    cuBLAS on Hopper, and cached blocks), the C heap's empty pages. Where another model's CUDA graphs live, cuBLAS keeps
    its memory."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        # Graphs of all models are captured on one stream, share its workspace, and have its address in them.
        if not any(issubclass(type(one), torch.cuda.CUDAGraph) for one in gc.get_objects()):
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        # Only glibc has it; other C libraries give pages back by themselves.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether these options are the same. What cannot even be compared, as arrays, is one caller's fault, not all's."""
    try:
        return one is other or one == other
    except Exception:
        return False


def _expect_options(overrides: dict[str, Any]) -> None:
    known = [entry.name for entry in fields(TranscribeOptions)]
    for name in overrides:
        if name not in known:
            raise OptionError(f"unknown option {name!r}: there are {', '.join(known)}")


def _expect(source: AudioInput, wanted: Kind) -> None:
    if kind_of(source) is not wanted:
        raise OptionError(f"{name_of(source)} is not a {_KINDS[wanted]}: SpeechService takes files and their bytes")


_KINDS = {Kind.PATH: "file's path", Kind.BYTES: "file's bytes"}


def _result(outcome: Transcript | AudioError) -> ServiceResult:
    if isinstance(outcome, AudioError):
        return ServiceResult(success=False, error=str(outcome))
    for notice in outcome.warnings:
        log_notice(notice)
    return ServiceResult(True, outcome.text, outcome.duration, outcome.language)


def _line(error: BaseException) -> str:
    """One line for the caller; a fault that is not the user's goes into the log in full."""
    if isinstance(error, QuasrError):
        return str(error)
    _log.error("the speech service failed", exc_info=error)
    return " ".join(f"internal error: {type(error).__name__}: {error}".split())
