"""The steps between audio and transcript, for any number of inputs: read, decode in batches, parse, join.

Pieces of several inputs share a batch. Inputs are read one after the other and a batch at a time, so memory
does not grow with their length, and they finish in the order they came in.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np

from quasr.audio.chunk import OFFICIAL_SECONDS, pieces, speech_pieces
from quasr.audio.decode import log_notice, stream
from quasr.audio.mel import log_mel
from quasr.audio.plan import PlanOptions
from quasr.audio.source import name_of
from quasr.audio.vad import detector, mostly_silent
from quasr.engine.base import ClipRequest, token_budget
from quasr.errors import AudioError, AudioTooLargeError
from quasr.text.languages import separator
from quasr.text.parse import parse_output
from quasr.types import SAMPLE_RATE, Notice, Segment, Timings, Transcript

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from quasr.audio.chunk import Piece
    from quasr.audio.fetch import FetchLimits
    from quasr.audio.source import AudioInput
    from quasr.engine.base import ClipResult, Engine
    from quasr.text.prompt import Prompt
    from quasr.text.tokenizer import Tokenizer
    from quasr.types import TranscribeOptions

Progress = Callable[[float], None]
"""Called after every batch with the seconds of audio done so far, over all inputs."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What all inputs of one call share. `language` is the forced language's name, or None."""

    tokenizer: Tokenizer
    prompt: Prompt
    language: str | None
    mel_bins: int
    options: TranscribeOptions
    limits: FetchLimits


@dataclass(slots=True)
class Job:
    """One input on its way: the segments so far, what it cost, and whether it failed."""

    source: AudioInput
    segments: list[Segment] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    waiting: int = 0
    read: bool = False
    error: AudioError | None = None

    @property
    def done(self) -> bool:
        """Read to the end, and every piece of it decoded."""
        return self.read and not self.waiting

    def spend(self, **seconds: float) -> None:
        """Adds to the timings' stages, and to their total what is not audio."""
        work = sum(value for stage, value in seconds.items() if stage != "audio")
        grown = {stage: getattr(self.timings, stage) + value for stage, value in seconds.items()}
        self.timings = replace(self.timings, **grown, total=self.timings.total + work)


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of one job, ready for the engine; `start` and `end` in seconds."""

    job: Job
    start: float
    end: float
    request: ClipRequest


def transcribe(
    engine: Engine, setup: Setup, sources: Iterable[AudioInput], progress: Progress | None = None
) -> Iterator[Transcript | AudioError]:
    """A transcript for each source, in order; an input that fails gives its error and does not stop the others."""
    jobs: deque[Job] = deque()
    for _ in _batches(engine, setup, _read_all(setup, sources, jobs), progress):
        yield from _finished(jobs)
    yield from _finished(jobs)


def stream_segments(
    engine: Engine, setup: Setup, source: AudioInput, progress: Progress | None = None
) -> Iterator[Segment]:
    """The segments of one input's transcript, each as soon as its batch is decoded.

    Raises AudioError where the audio cannot be read on, after the segments before that place. Warnings are logged.
    """
    jobs: deque[Job] = deque()
    seen = given = 0
    for _ in _batches(engine, setup, _read_all(setup, [source], jobs), progress):
        found = jobs[0].segments[seen:]
        seen += len(found)
        for segment in found:
            if segment.text:
                yield replace(segment, id=given)
                given += 1
    for notice in jobs[0].notices:
        log_notice(notice)
    if jobs[0].error:
        raise jobs[0].error


def _batches(engine: Engine, setup: Setup, tasks: Iterator[Task], progress: Progress | None) -> Iterator[None]:
    """Decodes `tasks` a batch at a time, and stops after each to have its results looked at."""
    seconds = 0.0
    while batch := tuple(islice(tasks, setup.options.batch_size)):
        _decode(engine, setup, batch)
        seconds += sum(task.end - task.start for task in batch)
        if progress:
            progress(seconds)
        yield


def _read_all(setup: Setup, sources: Iterable[AudioInput], jobs: deque[Job]) -> Iterator[Task]:
    for source in sources:
        job = Job(source)
        jobs.append(job)
        try:
            yield from _read(setup, job)
        except AudioError as error:
            job.error = error
        job.read = True


def _read(setup: Setup, job: Job) -> Iterator[Task]:
    started = time.perf_counter()
    blocks = _counted(stream(job.source, setup.limits, on_warning=job.notices.append), job)
    for piece in cut(blocks, setup.options, job):
        task = _task(setup, job, piece)
        job.spend(decode=time.perf_counter() - started)
        job.waiting += 1
        yield task
        started = time.perf_counter()


def _counted(blocks: Iterator[NDArray[np.float32]], job: Job) -> Iterator[NDArray[np.float32]]:
    """The same blocks; the job's seconds of audio grow with them, silence included."""
    for block in blocks:
        job.spend(audio=block.size / SAMPLE_RATE)
        yield block


def cut(blocks: Iterator[NDArray[np.float32]], options: TranscribeOptions, job: Job) -> Iterator[Piece]:
    """Pieces of a stream at 16 kHz, by `options.chunk`. What fits into one piece stays whole, unless it is mostly
    silence."""
    if options.chunk == "qwen":
        return pieces(blocks, OFFICIAL_SECONDS)
    if options.chunk == "none":
        return _uncut(blocks, job)
    head, more = _head(blocks, options.piece_seconds)
    if not more and not mostly_silent(np.concatenate(head)):
        return pieces(head, options.piece_seconds, search_seconds=0.0)
    chosen = detector()
    if chosen.name == "energy":
        job.notices.append(Notice("energy_vad", chosen.reason))
    return speech_pieces(chain(head, blocks), chosen, PlanOptions(longest=options.piece_seconds))


def _uncut(blocks: Iterator[NDArray[np.float32]], job: Job) -> Iterator[Piece]:
    head, more = _head(blocks, OFFICIAL_SECONDS)
    if more:
        raise AudioTooLargeError(
            f"{name_of(job.source)} is longer than the {OFFICIAL_SECONDS / 60:.0f} minutes that the model takes uncut: "
            "choose chunk vad or qwen"
        )
    yield from pieces(head, OFFICIAL_SECONDS)


def _head(blocks: Iterator[NDArray[np.float32]], seconds: float) -> tuple[list[NDArray[np.float32]], bool]:
    """The blocks up to the one that passes `seconds`, and whether one did."""
    head: list[NDArray[np.float32]] = []
    for block in blocks:
        head.append(block)
        if sum(map(len, head)) > seconds * SAMPLE_RATE:
            return head, True
    return head, False


def _task(setup: Setup, job: Job, piece: Piece) -> Task:
    request = ClipRequest(
        mel=log_mel(piece.samples, setup.mel_bins),
        prefix=setup.prompt.prefix,
        suffix=setup.prompt.suffix,
        max_new_tokens=setup.options.max_new_tokens or token_budget(piece.end - piece.start),
    )
    return Task(job, piece.start, piece.end, request)


def _decode(engine: Engine, setup: Setup, batch: Sequence[Task]) -> None:
    """Runs one batch, and shares its cost among the jobs by their seconds of audio."""
    before = replace(engine.stats)
    results = engine.run([task.request for task in batch])
    after = engine.stats
    prefill = after.encode_seconds + after.prefill_seconds - before.encode_seconds - before.prefill_seconds
    generate = after.generate_seconds - before.generate_seconds
    seconds = sum(task.end - task.start for task in batch)
    for task, result in zip(batch, results, strict=True):
        share = (task.end - task.start) / seconds
        task.job.spend(prefill=share * prefill, generate=share * generate)
        task.job.waiting -= 1
        _collect(setup, task, result)


def _collect(setup: Setup, task: Task, result: ClipResult) -> None:
    """Parses one piece's tokens into the job's next segment. A piece without speech is kept, with empty text."""
    job = task.job
    parsed = parse_output(setup.tokenizer.decode(result.tokens), setup.language)
    spoken = any(segment.text for segment in job.segments)
    glue = separator(parsed.language) if spoken and parsed.text else ""
    job.segments.append(
        Segment(
            id=len(job.segments),
            start=task.start,
            end=task.end,
            text=glue + parsed.text,
            language=parsed.language,
            avg_logprob=sum(result.logprobs) / len(result.logprobs) if result.logprobs else None,
            finish_reason=result.finish_reason,
        )
    )
    job.timings = replace(job.timings, tokens=job.timings.tokens + len(result.tokens))
    if result.finish_reason == "length":
        job.notices.append(_budget_notice(task))


def _budget_notice(task: Task) -> Notice:
    message = (
        f"decoding from {task.start:.1f} to {task.end:.1f} s stopped at its budget of "
        f"{task.request.max_new_tokens} tokens: the text there may be cut short or repeat itself"
    )
    return Notice("token_budget", message, task.start, task.end)


def _finished(jobs: deque[Job]) -> Iterator[Transcript | AudioError]:
    while jobs and jobs[0].done:
        job = jobs.popleft()
        yield job.error or _transcript(job)


def _transcript(job: Job) -> Transcript:
    spoken = [replace(segment, id=index) for index, segment in enumerate(s for s in job.segments if s.text)]
    cut = any(segment.finish_reason == "length" for segment in job.segments)
    return Transcript(
        text="".join(segment.text for segment in spoken),
        language=_commonest_language(spoken),
        duration=job.timings.audio,
        segments=tuple(spoken),
        finish_reason="length" if cut else "stop",
        warnings=tuple(job.notices),
        timings=job.timings,
    )


def _commonest_language(segments: Sequence[Segment]) -> str:
    """The language with most characters of text; the earlier one where two are equal."""
    weights: Counter[str] = Counter()
    for segment in segments:
        weights[segment.language] += len(segment.text)
    weights.pop("", None)
    return weights.most_common(1)[0][0] if weights else ""
