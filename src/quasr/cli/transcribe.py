"""`quasr transcribe`: transcripts on standard output or in files, everything else on standard error."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quasr.cli.options import (
    BatchSizeOption,
    ComputeTypeOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    HubOption,
    LanguageOption,
    MaxNewTokensOption,
    MemoryOption,
    ModelChoice,
    ModelOption,
    OfflineOption,
    OffloadOption,
    RevisionOption,
    ThresholdOption,
)
from quasr.cli.terminal import ProgressLine, megabytes, note, result
from quasr.errors import OptionError
from quasr.types import TranscribeOptions, Transcript

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quasr.errors import AudioError
    from quasr.pipeline.transcriber import Transcriber

ALL = "all"
DEFAULTS = TranscribeOptions()


@dataclass(frozen=True, slots=True)
class Destination:
    """Where transcripts go: to standard output in one format, or into `folder` in all of `formats`."""

    formats: tuple[str, ...]
    folder: Path | None

    def put(self, transcript: Transcript, stem: str) -> None:
        """Prints or writes one transcript."""
        from quasr.output import render, write_files

        if self.folder is None:
            result(render(transcript, self.formats[0]))
            return
        for path in write_files(transcript, self.folder, stem, self.formats):
            note(f"wrote {path}")


@dataclass(slots=True)
class Tally:
    """What has come out so far."""

    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    failed: list[str] = field(default_factory=list)


def transcribe(
    audio: Annotated[list[str], typer.Argument(metavar="AUDIO", help="Files or http(s) URLs.", show_default=False)],
    model: ModelOption = "demo",
    language: LanguageOption = None,
    context: ContextOption = "",
    output_format: Annotated[
        str, typer.Option("--format", "-f", help="txt, json, srt, vtt, tsv, or all (with -o).")
    ] = "txt",
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Write files there instead of to standard output.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    compute_type: ComputeTypeOption = "auto",
    threshold: ThresholdOption = None,
    memory: MemoryOption = None,
    offload: OffloadOption = 0,
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    batch_size: BatchSizeOption = DEFAULTS.batch_size,
    chunk: Annotated[
        str, typer.Option("--chunk", help="Cut long audio: vad (in pauses), qwen (every 20 minutes) or none.")
    ] = DEFAULTS.chunk,
    max_new_tokens: MaxNewTokensOption = None,
    allow_private_urls: Annotated[
        bool, typer.Option("--allow-private-urls", help="Fetch URLs of private addresses too.")
    ] = False,
) -> int:
    """Write down what is said in audio or video files."""
    destination = _destination(output_format, output_dir)
    stems = _stems(audio, destination)
    choice = ModelChoice(
        model, device, dtype, hub, revision, offline, compute_type, threshold, memory, batch_size, offload
    )
    with choice.load() as transcriber:
        options = replace(
            transcriber.defaults, language=language, context=context, max_new_tokens=max_new_tokens, chunk=chunk
        )
        tally = _run(transcriber, audio, stems, options, destination, allow_private_urls)
        _report(tally, len(audio), transcriber.info.device)
    return 1 if tally.failed else 0


def _destination(output_format: str, folder: Path | None) -> Destination:
    from quasr.output import FORMATS

    if output_format == ALL and folder is None:
        raise OptionError("-f all writes several files: say where with -o DIR")
    if output_format not in (*FORMATS, ALL):
        raise OptionError(f"unknown format {output_format!r}: use {', '.join(FORMATS)} or {ALL}")
    return Destination(FORMATS if output_format == ALL else (output_format,), folder)


def _stems(audio: Sequence[str], destination: Destination) -> list[str]:
    """Names of the output files. Two inputs must not write to the same one."""
    from quasr.audio.source import url_name

    stems = [Path(url_name(source) if "://" in source else source).stem or "transcript" for source in audio]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if destination.folder is not None and twice is not None:
        raise OptionError(f"several inputs would write {destination.folder / twice}.*: give them one at a time")
    return stems


def _run(
    transcriber: Transcriber,
    audio: Sequence[str],
    stems: Sequence[str],
    options: TranscribeOptions,
    destination: Destination,
    allow_private: bool,
) -> Tally:
    from quasr.audio.fetch import FetchLimits

    tally, progress = Tally(), ProgressLine()
    limits = FetchLimits(allow_private=allow_private)
    results = transcriber.transcribe_batch(audio, options, limits=limits, progress=progress)
    for source, stem, outcome in zip(audio, stems, results, strict=True):
        progress.clear()
        if isinstance(outcome, Transcript):
            _deliver(outcome, source, stem, destination, many=len(audio) > 1)
            tally.seconds += outcome.duration
        else:
            _excuse(outcome, source, tally)
    return tally


def _deliver(transcript: Transcript, source: str, stem: str, destination: Destination, *, many: bool) -> None:
    if many and destination.folder is None:
        note(f"{source}:")
    for warning in transcript.warnings:
        note(f"warning: {source}: {warning.message}")
    if not transcript.text:
        note(f"{source}: no speech was found")
    destination.put(transcript, stem)


def _excuse(error: AudioError, source: str, tally: Tally) -> None:
    note(f"error: {' '.join(str(error).split())}")
    tally.failed.append(source)


def _report(tally: Tally, inputs: int, device: str) -> None:
    from quasr.engine.device import peak_memory

    wall = time.perf_counter() - tally.started
    factor = f"{wall / tally.seconds:.3f}" if tally.seconds else "-"
    host, gpu = peak_memory(device)
    memory = [f"{megabytes(size)}{where}" for size, where in ((host, ""), (gpu, " on the GPU")) if size is not None]
    note(
        f"audio {tally.seconds:.1f} s, wall {wall:.1f} s, real-time factor {factor}"
        + (f", peak memory {', '.join(memory)}" if memory else "")
    )
    if tally.failed and inputs > 1:
        note(f"{len(tally.failed)} of {inputs} inputs failed: {', '.join(tally.failed)}")
