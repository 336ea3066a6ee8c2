"""`quasr transcribe`: transcripts on standard output or in files, everything else on standard error."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path  # noqa: TC003  (Typer reads the annotations)
from typing import TYPE_CHECKING, Annotated

import typer

from quasr.cli.inputs import check_names, gather
from quasr.cli.jobs import JobLines, read_jobs
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
from quasr.cli.outputs import Files, Printed, Style
from quasr.cli.work import Request, work
from quasr.errors import OptionError
from quasr.types import TranscribeOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quasr.cli.inputs import Input
    from quasr.cli.outputs import Outputs
    from quasr.output import LineRules

ALL = "all"
DEFAULT_FORMAT = "txt"
DEFAULTS = TranscribeOptions()


def transcribe(
    audio: Annotated[
        list[str] | None,
        typer.Argument(metavar="AUDIO", help="Files, folders (-r), patterns, http(s) URLs, or - for standard input."),
    ] = None,
    model: ModelOption = "demo",
    language: LanguageOption = None,
    context: ContextOption = "",
    output_format: Annotated[
        str, typer.Option("--format", "-f", help="txt, json, srt, vtt, tsv, or all (with -o).")
    ] = DEFAULT_FORMAT,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Write files there, not to standard output. With --jobs: a file."),
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Take the audio and video files in folders, as a tree.")
    ] = False,
    jobs: Annotated[
        Path | None, typer.Option("--jobs", help="JSONL of path or url, and id, language, context; gives JSONL.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With -o: do again what is complete. URLs count as unchanged.")
    ] = False,
    max_line_width: Annotated[
        int | None, typer.Option("--max-line-width", min=1, help="Most columns of a line of subtitles.")
    ] = None,
    max_line_count: Annotated[
        int | None, typer.Option("--max-line-count", min=1, help="Most lines of a subtitle.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    compute_type: ComputeTypeOption = "auto",
    threshold: ThresholdOption = None,
    memory: MemoryOption = None,
    offload: OffloadOption = 0,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of torch on the CPU.")] = None,
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
    # Whisper's spellings, so that its command lines work.
    whisper_dir: Annotated[Path | None, typer.Option("--output_dir", hidden=True)] = None,
    whisper_format: Annotated[str | None, typer.Option("--output_format", "--output-format", hidden=True)] = None,
    whisper_width: Annotated[int | None, typer.Option("--max_line_width", min=1, hidden=True)] = None,
    whisper_count: Annotated[int | None, typer.Option("--max_line_count", min=1, hidden=True)] = None,
    whisper_batch: Annotated[int | None, typer.Option("--batch_size", min=1, hidden=True)] = None,
    whisper_type: Annotated[str | None, typer.Option("--compute_type", hidden=True)] = None,
    hotwords: Annotated[str, typer.Option("--hotwords", hidden=True)] = "",
    word_timestamps: Annotated[str, typer.Option("--word_timestamps", "--word-timestamps", hidden=True)] = "False",
    highlight_words: Annotated[str, typer.Option("--highlight_words", "--highlight-words", hidden=True)] = "False",
    max_words_per_line: Annotated[
        int | None, typer.Option("--max_words_per_line", "--max-words-per-line", min=1, hidden=True)
    ] = None,
) -> int:
    """Write down what is said in audio or video files."""
    from quasr.output import LineRules

    _refuse_word_times(word_timestamps, highlight_words, max_words_per_line)
    rules = LineRules(whisper_width or max_line_width, whisper_count or max_line_count)
    style = _style(whisper_format or output_format, rules)
    target, batch = whisper_dir or output_dir, whisper_batch or batch_size
    choice = ModelChoice(
        model, device, dtype, hub, revision, offline, whisper_type or compute_type, threshold, memory, batch, offload
    )
    options = {
        "language": language,
        "context": "\n".join(filter(None, (context, hotwords))),
        "max_new_tokens": max_new_tokens,
        "chunk": chunk,
    }
    request = Request(choice, options, allow_private_urls, overwrite)
    _use_threads(threads)
    if jobs is not None:
        lines = _job_lines(audio, style, target)
        return work(read_jobs(jobs), lines, request)
    return work(*_inputs_and_outputs(audio, recursive, style, target), request)


def _refuse_word_times(word_timestamps: str, highlight_words: str, max_words_per_line: int | None) -> None:
    switches = (("word_timestamps", word_timestamps), ("highlight_words", highlight_words))
    for name, value in switches:
        if value.lower() not in ("true", "false"):
            raise OptionError(f"--{name} is {value[:40]!r}: it takes True or False")
    asked = [name for name, value in switches if value.lower() == "true"]
    if max_words_per_line is not None:
        asked.append("max_words_per_line")
    if asked:
        raise OptionError(f"--{asked[0]} needs the times of words, which this version has not: leave it out")


def _style(output_format: str, rules: LineRules) -> Style:
    from quasr.output import FORMATS

    if output_format not in (*FORMATS, ALL):
        raise OptionError(f"unknown format {output_format!r}: use {', '.join(FORMATS)} or {ALL}")
    return Style(FORMATS if output_format == ALL else (output_format,), rules)


def _use_threads(count: int | None) -> None:
    if count is None:
        return
    from quasr.engine.device import choose

    choose("cpu")  # raises where there is no torch
    import_module("torch").set_num_threads(count)


def _job_lines(audio: Sequence[str] | None, style: Style, path: Path | None) -> JobLines:
    if audio:
        raise OptionError("--jobs has its inputs in its file: give either that or AUDIO")
    if style.formats != (DEFAULT_FORMAT,):
        raise OptionError("--jobs gives JSONL: leave --format out")
    if path is not None and path.is_dir():
        raise OptionError(f"{path} is a folder: with --jobs, -o is the JSONL file to write")
    return JobLines(path)


def _inputs_and_outputs(
    audio: Sequence[str] | None, recursive: bool, style: Style, folder: Path | None
) -> tuple[list[Input], Outputs]:
    if not audio:
        raise OptionError("nothing to transcribe: give files, folders, URLs, - or --jobs FILE; see 'quasr --help'")
    if folder is None and len(style.formats) > 1:
        raise OptionError(f"-f {ALL} writes several files: say where with -o DIR")
    inputs = gather(audio, recursive=recursive)
    if folder is None:
        return inputs, Printed(style)
    check_names(inputs, folder)
    return inputs, Files(folder, style)
