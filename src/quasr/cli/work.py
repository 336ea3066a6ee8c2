"""The way from inputs to outputs: what is done is skipped, the rest transcribed, failures and speed are told."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quasr.cli.inputs import STDIN, total_seconds
from quasr.cli.interrupt import Interrupt
from quasr.cli.journal import Fingerprint
from quasr.cli.terminal import ProgressLine, megabytes, note
from quasr.errors import UnknownLanguageError
from quasr.types import Transcript

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from quasr.audio.source import AudioInput
    from quasr.cli.inputs import Input
    from quasr.cli.options import ModelChoice
    from quasr.cli.outputs import Outputs
    from quasr.errors import QuasrError
    from quasr.pipeline.transcriber import Transcriber


@dataclass(frozen=True, slots=True)
class Request:
    """How all inputs are transcribed: `options` are fields of TranscribeOptions. `overwrite` does all again."""

    choice: ModelChoice
    options: Mapping[str, Any]
    allow_private: bool = False
    overwrite: bool = False

    def fingerprint(self, style: Mapping[str, Any]) -> Fingerprint:
        """What transcripts in that style depend on beside their audio. Fetches the model where it is not here."""
        from quasr.weights.hub import HubOptions, resolve
        from quasr.weights.record import identity

        choice = self.choice
        hub = HubOptions(hub=choice.hub, revision=choice.revision, offline=choice.offline)
        names = ("engine", "dtype", "compute_type", "threshold", "memory")
        precision = {name: getattr(choice, name) for name in names}
        return Fingerprint(identity(resolve(choice.model, hub)), {**precision, **self.options, **style})


@dataclass(slots=True)
class Tally:
    """What has come out so far of `inputs` inputs."""

    inputs: int
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    done: int = 0
    failed: list[str] = field(default_factory=list)


def work(inputs: Sequence[Input], outputs: Outputs, request: Request) -> int:
    """Transcribes what is not done yet: 0, or 1 if an input failed.

    Raises QuasrError for what concerns all inputs. An interrupt is told and raised again; what was done is kept.
    """
    fingerprint = None if outputs.style is None else request.fingerprint(outputs.style)
    if fingerprint is not None:
        # What is fetched is here now: it must not change between its fingerprint and its loading.
        request = replace(request, choice=replace(request.choice, offline=True))
    pending = [item for item in inputs if request.overwrite or not _is_done(item, outputs, fingerprint)]
    if len(pending) < len(inputs):
        skipped = len(inputs) - len(pending)
        note(f"{skipped} of {len(inputs)} inputs skipped: complete and unchanged (--overwrite does them again)")
    if not pending:
        return 0
    try:
        return _Run(pending, outputs, request, fingerprint).finish()
    finally:
        outputs.close()


def _is_done(item: Input, outputs: Outputs, fingerprint: Fingerprint | None) -> bool:
    known = outputs.key(item.name)
    return known is not None and fingerprint is not None and known == fingerprint.of(item)


class _Run:
    def __init__(
        self, pending: Sequence[Input], outputs: Outputs, request: Request, fingerprint: Fingerprint | None
    ) -> None:
        self._pending = pending
        self._outputs = outputs
        self._request = request
        self._fingerprint = fingerprint
        self._keys: dict[str, str | None] = {}
        self._tally = Tally(len(pending))
        self._progress = ProgressLine()
        self._interrupt = Interrupt()

    def finish(self) -> int:
        if all(item.error for item in self._pending):
            self._outputs.start(self._pending)
            self._take((item, item.error) for item in self._pending)
            return 1
        with self._request.choice.load() as transcriber:
            self._outputs.start(self._pending)
            self._progress.expect(total_seconds(self._pending) if self._progress.shown else None)
            try:
                with self._interrupt:
                    for items in _alike(self._pending):
                        self._take(self._outcomes(transcriber, items))
                        self._interrupt.rest()
            except KeyboardInterrupt:
                self._progress.clear()
                again = "; run the same command again to go on" if self._fingerprint else ""
                note(f"interrupted: {self._tally.done} of {self._tally.inputs} inputs are done{again}")
                _report(self._tally, transcriber.info.device)
                raise
            _report(self._tally, transcriber.info.device)
        return 1 if self._tally.failed else 0

    def _outcomes(
        self, transcriber: Transcriber, items: Sequence[Input]
    ) -> Iterator[tuple[Input, Transcript | QuasrError]]:
        """Each input with its transcript or error, in order. A language of its own that is not known is its error."""
        from quasr.audio.fetch import FetchLimits

        before, own = self._tally.seconds, _own(items[0])
        try:
            results = transcriber.transcribe_batch(
                self._sources(items),
                replace(transcriber.defaults, **{**self._request.options, **own}),
                limits=FetchLimits(allow_private=self._request.allow_private),
                progress=lambda seconds: self._show(before + seconds),
            )
        except UnknownLanguageError as error:
            if "language" not in own:
                raise
            yield from ((item, item.error or error) for item in items)
            return
        for item in items:
            yield item, item.error or next(results)

    def _sources(self, items: Iterable[Input]) -> Iterator[AudioInput]:
        """What the transcriber reads, each with its fingerprint from just before: a later change is seen next time."""
        for item in items:
            if item.error is None:
                self._interrupt.rest()
                self._keys[item.name] = self._fingerprint.of(item) if self._fingerprint else None
                yield sys.stdin.buffer if item.source == STDIN else item.source

    def _show(self, seconds: float) -> None:
        self._progress(seconds)
        self._interrupt.batch()

    def _take(self, outcomes: Iterable[tuple[Input, Transcript | QuasrError | None]]) -> None:
        for item, outcome in outcomes:
            self._interrupt.result()
            self._progress.clear()
            if isinstance(outcome, Transcript):
                self._deliver(item, outcome)
            else:
                self._excuse(item, " ".join(str(outcome).split()))

    def _deliver(self, item: Input, transcript: Transcript) -> None:
        for warning in transcript.warnings:
            named = warning.message.startswith(item.label)
            note(f"warning: {warning.message}" if named else f"warning: {item.label}: {warning.message}")
        if not transcript.text:
            note(f"{item.label}: no speech was found")
        self._outputs.put(item, transcript, self._keys.get(item.name))
        self._tally.seconds += transcript.duration
        self._tally.done += 1

    def _excuse(self, item: Input, message: str) -> None:
        note(f"error: {message}")
        self._outputs.fail(item, message)
        self._tally.failed.append(item.label)


def _alike(items: Iterable[Input]) -> list[list[Input]]:
    """Inputs that share a batch: those of the same language and context, in the order of their first."""
    groups: dict[tuple[str | None, str | None], list[Input]] = {}
    for item in items:
        groups.setdefault((item.language, item.context), []).append(item)
    return list(groups.values())


def _own(item: Input) -> dict[str, str]:
    given = {"language": item.language, "context": item.context}
    return {name: value for name, value in given.items() if value is not None}


def _report(tally: Tally, device: str) -> None:
    from quasr.engine.device import peak_memory

    wall = time.perf_counter() - tally.started
    factor = f"{wall / tally.seconds:.3f}" if tally.seconds else "-"
    host, gpu = peak_memory(device)
    memory = [f"{megabytes(size)}{where}" for size, where in ((host, ""), (gpu, " on the GPU")) if size is not None]
    note(
        f"audio {tally.seconds:.1f} s, wall {wall:.1f} s, real-time factor {factor}"
        + (f", peak memory {', '.join(memory)}" if memory else "")
    )
    if tally.failed and tally.inputs > 1:
        note(f"{len(tally.failed)} of {tally.inputs} inputs failed: {', '.join(tally.failed)}")
