"""`quasr transcribe`: transcripts on standard output or in files, everything else on standard error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quasr.cli.inputs import check_names, gather, refuse_long_names
from quasr.cli.jobs import JobLines, read_jobs
from quasr.cli.options import (
    BatchSizeOption,
    ComputeTypeOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    HubOption,
    LanguageOption,
    MaxNewTokensOption,
    MemoryOption,
    ModelChoice,
    ModelOption,
    OfflineOption,
    OffloadOption,
    ProviderOption,
    RevisionOption,
    ThreadsOption,
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

ALL = "all"
DEFAULT_FORMAT = "txt"
DEFAULTS = TranscribeOptions()


AudioArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="AUDIO", help="Files, folders (-r), patterns, http(s) URLs, or - for standard input."),
]
FormatOption = Annotated[
    str, typer.Option("--format", "--output-format", "-f", help="txt, json, srt, vtt, tsv, or all (with -o).")
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", help="Write files there, not to standard output. With --jobs: a file."),
]
RecursiveOption = Annotated[
    bool, typer.Option("--recursive", "-r", help="Take the audio and video files in folders, as a tree.")
]
JobsOption = Annotated[
    Path | None, typer.Option("--jobs", help="JSONL of path or url, and id, language, context; gives JSONL.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="With -o: do again what is complete. URLs count as unchanged.")
]
WidthOption = Annotated[
    int | None, typer.Option("--max-line-width", min=1, help="Most columns of a line of subtitles.")
]
CountOption = Annotated[int | None, typer.Option("--max-line-count", min=1, help="Most lines of a subtitle.")]
ChunkOption = Annotated[
    str, typer.Option("--chunk", help="Cut long audio: vad (in pauses), qwen (every 20 minutes) or none.")
]
GuardsOption = Annotated[
    bool, typer.Option("--guards/--no-guards", help="Stop loops, and try suspect pieces once more.")
]
PrivateOption = Annotated[bool, typer.Option("--allow-private-urls", help="Fetch URLs of private addresses too.")]

# Whisper's own, which have no other spelling here.
HotwordsOption = Annotated[str, typer.Option("--hotwords", hidden=True)]
WordTimesOption = Annotated[str, typer.Option("--word-timestamps", hidden=True)]
HighlightOption = Annotated[str, typer.Option("--highlight-words", hidden=True)]
WordsPerLineOption = Annotated[int | None, typer.Option("--max-words-per-line", min=1, hidden=True)]


def whisper_spelling(option: str) -> str:
    """`--output_dir` is `--output-dir`: command lines of Whisper's work, whose options have underscores."""
    return option.replace("_", "-")


def transcribe(
    audio: AudioArgument = None,
    model: ModelOption = "demo",
    language: LanguageOption = None,
    context: ContextOption = "",
    output_format: FormatOption = DEFAULT_FORMAT,
    output_dir: OutputOption = None,
    recursive: RecursiveOption = False,
    jobs: JobsOption = None,
    overwrite: OverwriteOption = False,
    max_line_width: WidthOption = None,
    max_line_count: CountOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    compute_type: ComputeTypeOption = "auto",
    threshold: ThresholdOption = None,
    memory: MemoryOption = None,
    offload: OffloadOption = 0,
    engine: EngineOption = "auto",
    provider: ProviderOption = "auto",
    threads: ThreadsOption = None,
    hub: HubOption = "huggingface",
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    batch_size: BatchSizeOption = DEFAULTS.batch_size,
    chunk: ChunkOption = DEFAULTS.chunk,
    guards: GuardsOption = DEFAULTS.guards,
    max_new_tokens: MaxNewTokensOption = None,
    allow_private_urls: PrivateOption = False,
    hotwords: HotwordsOption = "",
    word_timestamps: WordTimesOption = "False",
    highlight_words: HighlightOption = "False",
    max_words_per_line: WordsPerLineOption = None,
) -> int:
    """Write down what is said in audio or video files."""
    _refuse_word_times(word_timestamps, highlight_words, max_words_per_line)
    style = _style(output_format, max_line_width, max_line_count)
    precision = (compute_type, threshold, memory, batch_size, offload)
    choice = ModelChoice(
        model, device, dtype, hub, revision, offline, *precision, engine=engine, provider=provider, threads=threads
    )
    options = {
        "language": language,
        "context": "\n".join(filter(None, (context, hotwords))),
        "max_new_tokens": max_new_tokens,
        "chunk": chunk,
        "guards": guards,
    }
    request = Request(choice, options, allow_private_urls, overwrite)
    if jobs is not None:
        lines = _job_lines(audio, style, output_dir)
        return work(read_jobs(jobs), lines, request)
    return work(*_inputs_and_outputs(audio, recursive, style, output_dir), request)


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


def _style(output_format: str, width: int | None, count: int | None) -> Style:
    from quasr.output import FORMATS, LineRules

    if output_format not in (*FORMATS, ALL):
        raise OptionError(f"unknown format {output_format!r}: use {', '.join(FORMATS)} or {ALL}")
    return Style(FORMATS if output_format == ALL else (output_format,), LineRules(width, count))


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
    return refuse_long_names(inputs), Files(folder, style)
