"""The steps between audio and transcript, for any number of inputs: read, decode in batches, parse, join.

Pieces of several inputs share a batch. Inputs are read one after the other and a batch at a time, so memory
does not grow with their length, and they finish in the order they came in.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from quasr.audio.chunk import OFFICIAL_SECONDS, SEARCH_SECONDS, pieces, speech_pieces
from quasr.audio.decode import log_notice, stream
from quasr.audio.plan import PlanOptions
from quasr.audio.source import name_of
from quasr.audio.vad import detector, mostly_silent
from quasr.engine.base import ClipRequest, token_budget
from quasr.errors import AudioError, AudioTooLargeError
from quasr.pipeline.feed import answers
from quasr.pipeline.guard import (
    Case,
    Verdict,
    budget_fault,
    compare,
    late_flips,
    majority_language,
    read_result,
    remedy,
    warning,
)
from quasr.pipeline.retry import SAME_WEIGHTS, Engines, Retry
from quasr.text.languages import separator
from quasr.text.prompt import build_prompt
from quasr.types import SAMPLE_RATE, Notice, Segment, Timings, Transcript

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from quasr.audio.chunk import Piece
    from quasr.audio.fetch import FetchLimits
    from quasr.audio.source import AudioInput
    from quasr.engine.base import ClipResult, Engine, EngineStats
    from quasr.pipeline.guard import Part
    from quasr.text.prompt import Prompt
    from quasr.text.tokenizer import Tokenizer
    from quasr.types import TranscribeOptions

Progress = Callable[[float], None]
"""Called after every batch with the seconds of audio done so far, over all inputs."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What all inputs of one call share. `language` is the forced language's name, or None.

    No piece may be longer than `longest` seconds: the model's limit, or what a memory plan allows. A notice tells of
    one longer than `trained` seconds, the most that the model has met; None where it does not say.
    """

    tokenizer: Tokenizer
    prompt: Prompt
    language: str | None
    options: TranscribeOptions
    limits: FetchLimits
    retry: Retry = SAME_WEIGHTS
    longest: float = OFFICIAL_SECONDS
    trained: float | None = None


@dataclass(slots=True)
class Job:
    """One input on its way: the segments so far, what it cost, and whether it failed.

    It may be read in one thread while another decodes its first pieces: what both change is changed under `lock`.
    """

    source: AudioInput
    segments: list[Segment] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    waiting: int = 0
    read: bool = False
    error: AudioError | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def done(self) -> bool:
        """Read to the end, and every piece of it decoded."""
        return self.read and not self.waiting

    def wait_for(self, pieces: int) -> None:
        """Counts pieces that are on their way, or with a minus those that are decoded."""
        with self.lock:
            self.waiting += pieces

    def spend(self, tokens: int = 0, **seconds: float) -> None:
        """Adds tokens, seconds to the timings' stages, and to their total what is not audio."""
        work = sum(value for stage, value in seconds.items() if stage != "audio")
        with self.lock:
            old = self.timings
            grown = {stage: getattr(old, stage) + value for stage, value in seconds.items()}
            self.timings = replace(old, **grown, total=old.total + work, tokens=old.tokens + tokens)


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of one job, ready for the engine. The piece is kept for a second try, until its batch is done."""

    job: Job
    piece: Piece
    request: ClipRequest

    @property
    def seconds(self) -> float:
        return self.piece.end - self.piece.start


def transcribe(
    engine: Engine, setup: Setup, sources: Iterable[AudioInput], progress: Progress | None = None
) -> Iterator[Transcript | AudioError]:
    """A transcript for each source, in order; an input that fails gives its error and does not stop the others."""
    jobs: deque[Job] = deque()
    with Engines(engine, _retry(setup)) as engines:
        for _ in _batches(engines, setup, _read_all(setup, sources, jobs), progress):
            yield from _finished(setup, jobs)
    yield from _finished(setup, jobs)


def stream_segments(
    engine: Engine, setup: Setup, source: AudioInput, progress: Progress | None = None
) -> Iterator[Segment]:
    """The segments of one input's transcript, each as soon as its batch is decoded.

    Raises AudioError where the audio cannot be read on, after the segments before that place. Warnings are logged.
    """
    jobs: deque[Job] = deque()
    seen = given = 0
    with Engines(engine, _retry(setup)) as engines:
        for _ in _batches(engines, setup, _read_all(setup, [source], jobs), progress):
            found = jobs[0].segments[seen:]
            seen += len(found)
            for segment in found:
                if segment.text:
                    yield replace(segment, id=given)
                    given += 1
    _judge_whole(setup, jobs[0])
    for notice in jobs[0].notices:
        log_notice(notice)
    if jobs[0].error:
        raise jobs[0].error


def _retry(setup: Setup) -> Retry:
    if setup.options.precise_retry or setup.retry.make is None:
        return setup.retry
    return Retry("quantised", "the options say so")


def _batches(
    engines: Engines, setup: Setup, tasks: Generator[Task, None, None], progress: Progress | None
) -> Iterator[None]:
    """Decodes `tasks` a batch at a time, and stops after each to have its results looked at."""
    seconds, before = 0.0, replace(engines.first.stats)
    for batch, results in answers(engines.first, tasks, setup.options.batch_size):
        _share_cost(batch, results, before, engines.first.stats)
        _take(engines, setup, batch, results)
        before = replace(engines.first.stats)
        seconds += sum(task.seconds for task in batch)
        if progress:
            progress(seconds)
        yield


def _read_all(setup: Setup, sources: Iterable[AudioInput], jobs: deque[Job]) -> Generator[Task, None, None]:
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
    for piece in cut(blocks, setup.options, job, setup.longest):
        _note_length(setup, job, piece)
        task = _task(setup, job, piece, setup.prompt)
        job.spend(decode=time.perf_counter() - started)
        job.wait_for(1)
        yield task
        started = time.perf_counter()


def _note_length(setup: Setup, job: Job, piece: Piece) -> None:
    """Tells of the first piece of a file that is longer than all that the model was trained on."""
    told = any(notice.code == "long_piece" for notice in job.notices)
    if setup.trained is None or piece.end - piece.start <= setup.trained or told:
        return
    message = (
        f"from {piece.start:.1f} to {piece.end:.1f} s is one piece, and this model was trained on {setup.trained:g} s "
        "at most: check the text, or have it cut (chunk vad, in pieces no longer than that)"
    )
    job.notices.append(Notice("long_piece", message, piece.start, piece.end))


def _counted(blocks: Iterator[NDArray[np.float32]], job: Job) -> Iterator[NDArray[np.float32]]:
    """The same blocks; the job's seconds of audio grow with them, silence included."""
    for block in blocks:
        job.spend(audio=block.size / SAMPLE_RATE)
        yield block


def cut(
    blocks: Iterator[NDArray[np.float32]], options: TranscribeOptions, job: Job, longest: float = OFFICIAL_SECONDS
) -> Iterator[Piece]:
    """Pieces of a stream at 16 kHz, by `options.chunk`. What fits into one piece stays whole, unless it is mostly
    silence."""
    if options.chunk == "qwen":
        return _official(blocks, job, longest)
    if options.chunk == "none":
        return _uncut(blocks, job, longest)
    head, more = _head(blocks, options.piece_seconds)
    if not more and not mostly_silent(np.concatenate(head)):
        return pieces(head, options.piece_seconds, search_seconds=0.0)
    chosen = detector()
    if chosen.name == "energy":
        job.notices.append(Notice("energy_vad", chosen.reason))
    return speech_pieces(chain(head, blocks), chosen, PlanOptions(longest=options.piece_seconds))


def _official(blocks: Iterator[NDArray[np.float32]], job: Job, longest: float) -> Iterator[Piece]:
    """By the official rule. Under a memory plan its pieces are as long as that allows, the search included."""
    if longest >= OFFICIAL_SECONDS:
        return pieces(blocks, OFFICIAL_SECONDS)
    head, more = _head(blocks, longest)
    if not more:
        return pieces(head, OFFICIAL_SECONDS)
    search = min(SEARCH_SECONDS, longest / 3)
    shorter = f"cut about every {longest - search:g} s and not every {OFFICIAL_SECONDS / 60:.0f} minutes"
    job.notices.append(Notice("memory_cut", f"{shorter}: the memory plan allows pieces of {longest:g} s"))
    return pieces(chain(head, blocks), longest - search, search)


def _uncut(blocks: Iterator[NDArray[np.float32]], job: Job, longest: float) -> Iterator[Piece]:
    head, more = _head(blocks, longest)
    if more and longest < OFFICIAL_SECONDS:
        raise AudioTooLargeError(
            f"{name_of(job.source)} is longer than the {longest:g} s that the memory plan allows uncut: "
            "choose chunk vad or qwen, or allow more memory"
        )
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


def _task(setup: Setup, job: Job, piece: Piece, prompt: Prompt) -> Task:
    request = ClipRequest(
        samples=piece.samples,
        prefix=prompt.prefix,
        suffix=prompt.suffix,
        max_new_tokens=setup.options.max_new_tokens or token_budget(piece.end - piece.start),
        stop_loops=setup.options.guards,
    )
    return Task(job, piece, request)


def _take(engines: Engines, setup: Setup, batch: Sequence[Task], results: Sequence[ClipResult]) -> None:
    """Reads one batch's results, tries its suspect pieces again, and adds the text to the jobs."""
    parts = _parts(setup, batch, results, setup.language)
    for index, (task, part) in enumerate(zip(batch, parts, strict=True)):
        task.job.wait_for(-1)
        languages = Counter(segment.language for segment in task.job.segments if segment.text)
        mates = zip(batch[index + 1 :], parts[index + 1 :], strict=True)
        languages.update(later.language for mate, later in mates if mate.job is task.job and later.text)
        _collect(task.job, _guarded(engines, setup, task, part, majority_language(languages)))


def _run(engine: Engine, setup: Setup, tasks: Sequence[Task], language: str | None) -> list[Part]:
    """Runs one batch."""
    before = replace(engine.stats)
    results = engine.run([task.request for task in tasks])
    _share_cost(tasks, results, before, engine.stats)
    return _parts(setup, tasks, results, language)


def _parts(setup: Setup, tasks: Sequence[Task], results: Sequence[ClipResult], language: str | None) -> list[Part]:
    return [
        read_result(setup.tokenizer, task.piece, result, language) for task, result in zip(tasks, results, strict=True)
    ]


def _share_cost(tasks: Sequence[Task], results: Sequence[ClipResult], before: EngineStats, after: EngineStats) -> None:
    """Shares what the engine spent among the jobs, by their seconds of audio."""
    prefill = after.encode_seconds + after.prefill_seconds - before.encode_seconds - before.prefill_seconds
    generate = after.generate_seconds - before.generate_seconds
    seconds = sum(task.seconds for task in tasks)
    for task, result in zip(tasks, results, strict=True):
        share = task.seconds / seconds
        task.job.spend(len(result.tokens), prefill=share * prefill, generate=share * generate)


def _guarded(engines: Engines, setup: Setup, task: Task, part: Part, majority: str) -> Sequence[Part]:
    """The text of one piece, after a second try where the first is suspect. A budget that was asked for is none."""
    case = Case(task.piece, setup.options.context, setup.language, majority, setup.tokenizer)
    faults = case.faults([part]) if setup.options.guards else budget_fault([part])
    asked_for = budget_fault([part]) if setup.options.max_new_tokens else frozenset()
    verdict = Verdict((part,), dict.fromkeys(sorted(faults)))
    if setup.options.guards and faults - asked_for:
        again, pieces = remedy(case, faults)
        verdict = compare(case, [part], again, _again(engines.second(), setup, task, again, pieces))
    budget, retry = task.request.max_new_tokens, engines.retry
    task.job.notices += [warning(code, task.piece, helped, budget, retry) for code, helped in verdict.faults.items()]
    if setup.options.guards and case.doubts(verdict.parts):
        task.job.notices.append(warning("doubtful_speech", task.piece))
    return verdict.parts


def _again(engine: Engine, setup: Setup, task: Task, case: Case, pieces: Sequence[Piece]) -> list[Part]:
    """The second try: these pieces, alone."""
    prompt = build_prompt(setup.tokenizer, case.context, case.forced)
    parts = _run(engine, setup, [_task(setup, task.job, piece, prompt) for piece in pieces], case.forced)
    return [replace(part, end=min(part.end, task.piece.end)) for part in parts]


def _collect(job: Job, parts: Sequence[Part]) -> None:
    """Adds one piece to the job's segments. A piece without speech is kept, with empty text."""
    for part in parts:
        spoken = any(segment.text for segment in job.segments)
        glue = separator(part.language) if spoken and part.text else ""
        job.segments.append(
            Segment(
                id=len(job.segments),
                start=part.start,
                end=part.end,
                text=glue + part.text,
                language=part.language,
                avg_logprob=part.avg_logprob,
                finish_reason=part.finish_reason,
                tokens=part.tokens,
                token_logprobs=part.logprobs,
            )
        )


def _judge_whole(setup: Setup, job: Job) -> None:
    if setup.options.guards:
        job.notices += late_flips(job.segments, job.notices)


def _finished(setup: Setup, jobs: deque[Job]) -> Iterator[Transcript | AudioError]:
    while jobs and jobs[0].done:
        job = jobs.popleft()
        _judge_whole(setup, job)
        yield job.error or _transcript(job)


def _transcript(job: Job) -> Transcript:
    spoken = [replace(segment, id=index) for index, segment in enumerate(s for s in job.segments if s.text)]
    reasons = {segment.finish_reason for segment in job.segments}
    return Transcript(
        text="".join(segment.text for segment in spoken),
        language=_commonest_language(spoken),
        duration=job.timings.audio,
        segments=tuple(spoken),
        finish_reason="length" if "length" in reasons else "loop" if "loop" in reasons else "stop",
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
