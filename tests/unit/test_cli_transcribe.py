"""`quasr transcribe` around a transcriber that answers from a table."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Self

import pytest

from quasr.cli import main
from quasr.cli.interrupt import Interrupt
from quasr.cli.options import ModelChoice
from quasr.cli.terminal import ProgressLine, duration, progress_text
from quasr.engine.base import EngineInfo
from quasr.errors import AudioDecodeError, AudioError, UnknownLanguageError
from quasr.types import Notice, Segment, TranscribeOptions, Transcript

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import BinaryIO

    from quasr.audio.fetch import FetchLimits


def said(text: str, *warnings: Notice) -> Transcript:
    segments = (Segment(0, 0.0, 2.0, text, "English"),) if text else ()
    return Transcript(text, "English" if text else "", 2.0, segments, warnings=warnings)


ANSWERS: dict[str, Transcript | AudioError] = {
    "a.wav": said("Grüße, first."),
    "dir/b.mp3": said("Second."),
    "silent.wav": said(""),
    "cut.wav": said(
        "Cut", Notice("token_budget", "stopped early", 0.0, 2.0), Notice("damaged_audio", "cut.wav is damaged: a part")
    ),
    "bad.wav": AudioDecodeError("bad.wav is not\naudio"),
    "https://host/talks/day%201.mp3?secret=1": said("From afar."),
    "other/a.flac": said("Same stem."),
    "stop.wav": said("Until here."),
}


class FakeTranscriber:
    info = EngineInfo("fake", "cpu", "fp32", 1)
    seen: list[tuple[TranscribeOptions, FetchLimits]]
    read: list[str]
    defaults: TranscribeOptions

    def __init__(self) -> None:
        self.seen = []
        self.read = []

    def transcribe_batch(
        self,
        audios: Iterator[str | BinaryIO],
        options: TranscribeOptions,
        *,
        limits: FetchLimits,
        progress: Callable[[float], None],
    ) -> Iterator[Transcript | AudioError]:
        if options.language == "xx":
            raise UnknownLanguageError("xx is no language")
        self.seen.append((options, limits))
        return (self.answer(source, progress) for source in audios)

    def answer(self, source: str | BinaryIO, progress: Callable[[float], None]) -> Transcript | AudioError:
        if not isinstance(source, str):
            return said(f"read {len(source.read())} bytes")
        if source in ("stop.wav", "twice.wav"):
            for _ in range(1 + (source == "twice.wav")):
                signal.raise_signal(signal.SIGINT)
        progress(2.0)
        self.read.append(source)
        return ANSWERS[source]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTranscriber:
    transcriber = FakeTranscriber()

    def load(choice: ModelChoice) -> FakeTranscriber:
        transcriber.defaults = TranscribeOptions(batch_size=choice.batch_size or 1)
        return transcriber

    monkeypatch.setattr(ModelChoice, "load", load)
    return transcriber


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["quasr", "transcribe", *arguments])
    return main._exit_code()


pytestmark = pytest.mark.usefixtures("fake")


def test_stdout_has_the_transcript_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fake: FakeTranscriber
) -> None:
    assert run(monkeypatch, "a.wav", "--language", "de", "--context", "names", "--batch-size", "3") == 0
    captured = capsys.readouterr()
    assert captured.out == "Grüße, first.\n"
    assert "audio 2.0 s, wall " in captured.err
    assert "real-time factor" in captured.err
    assert "peak memory" in captured.err
    options, limits = fake.seen[0]
    assert options == TranscribeOptions(language="de", context="names", batch_size=3)
    assert limits.allow_private is False


def test_one_bad_of_many_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "a.wav", "bad.wav", "dir/b.mp3") == 1
    captured = capsys.readouterr()
    assert captured.out == "Grüße, first.\nSecond.\n"
    assert "error: bad.wav is not audio\n" in captured.err
    assert "1 of 3 inputs failed: bad.wav\n" in captured.err


def test_silence_and_warnings_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "silent.wav", "cut.wav") == 0
    captured = capsys.readouterr()
    assert captured.out == "\nCut\n"
    assert "silent.wav: no speech was found" in captured.err
    assert "warning: cut.wav: stopped early\nwarning: cut.wav is damaged: a part\n" in captured.err


def test_json_on_stdout_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "a.wav", "-f", "json") == 0
    assert json.loads(capsys.readouterr().out)["text"] == "Grüße, first."


def test_files_in_all_formats(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "folder"
    assert run(monkeypatch, "a.wav", "https://host/talks/day%201.mp3?secret=1", "-f", "all", "-o", str(out)) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "secret" not in captured.err
    names = {path.name for path in out.iterdir()}
    formats = ("txt", "srt", "vtt", "tsv", "json")
    assert names == {".quasr.jsonl", *(f"{stem}.{fmt}" for stem in ("a", "day%201") for fmt in formats)}
    assert (out / "a.txt").read_text(encoding="utf-8") == "Grüße, first.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.wav", "-f", "all"), "-f all writes several files"),
        (("a.wav", "-f", "docx"), "unknown format 'docx'"),
        (("a.wav", "other/a.flac", "-o", "out"), "several inputs would write"),
        (("a.wav", "--word_timestamps", "True"), "--word_timestamps needs the times of words"),
        (("a.wav", "--highlight_words", "true"), "--highlight_words needs the times of words"),
        (("a.wav", "--max_words_per_line", "4"), "--max_words_per_line needs the times of words"),
        (("a.wav", "--word-timestamps", "a.wav"), "--word_timestamps is 'a.wav': it takes True or False"),
        (("a.wav", "--max_line_count", "2"), "max_line_count has no effect alone"),
        ((), "nothing to transcribe"),
        (("a.wav", "--jobs", "jobs.jsonl"), "--jobs has its inputs in its file"),
        (("--jobs", "jobs.jsonl", "-f", "srt"), "--jobs gives JSONL"),
        (("--jobs", "jobs.jsonl", "-o", "."), ". is a folder: with --jobs"),
        (("--jobs", "no-such.jsonl"), "no-such.jsonl cannot be read"),
        (("a.wav", "--language", "xx"), "xx is no language"),
    ],
)
def test_options_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fake: FakeTranscriber,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert fake.seen == []


def test_whispers_flags_mean_what_they_mean_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fake: FakeTranscriber, tmp_path: Path
) -> None:
    flags = "--output_format srt --max_line_width 7 --max_line_count 1 --word_timestamps False --highlight_words False"
    more = "--batch_size 3 --compute_type fp32 --hotwords Ohm --context Watt"
    assert run(monkeypatch, "a.wav", "--output_dir", str(tmp_path), *flags.split(), *more.split()) == 0
    assert [path.name for path in tmp_path.glob("*.*") if path.name[0] != "."] == ["a.srt"]
    cues = (tmp_path / "a.srt").read_text(encoding="utf-8").split("\n\n")
    assert [cue.splitlines()[2:] for cue in cues] == [["Grüße,"], ["first."]]
    assert fake.seen[0][0] == TranscribeOptions(context="Watt\nOhm", batch_size=3)
    capsys.readouterr()
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert "--max-line-width" in shown
    assert "_" not in shown
    assert "hotwords" not in shown


def test_guards_are_on_unless_they_are_turned_off(monkeypatch: pytest.MonkeyPatch, fake: FakeTranscriber) -> None:
    assert run(monkeypatch, "a.wav") == run(monkeypatch, "a.wav", "--no-guards") == 0
    assert [options.guards for options, _ in fake.seen] == [True, False]


def test_underscores_in_values_stay(monkeypatch: pytest.MonkeyPatch, fake: FakeTranscriber, recordings: Path) -> None:
    assert run(monkeypatch, "a.wav", "--context=max_line_width", "-oso_me", "--output_format=srt") == 0
    assert fake.seen[0][0].context == "max_line_width"
    assert (recordings / "so_me" / "a.srt").is_file()


def test_standard_input_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(5))))
    assert run(monkeypatch, "-", "-o", str(tmp_path)) == 0
    assert (tmp_path / "stdin.txt").read_text() == "read 5 bytes\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(3))))
    assert run(monkeypatch, "-") == 0
    assert capsys.readouterr().out == "read 3 bytes\n"


def test_a_folder_alone_is_told_without_loading_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fake: FakeTranscriber, tmp_path: Path
) -> None:
    assert run(monkeypatch, str(tmp_path)) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path} is a folder: add -r to take the audio and video files in it\n"
    )
    assert fake.seen == []


@pytest.fixture
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.wav", "dir/b.mp3", "silent.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.usefixtures("recordings")
def test_only_what_changed_is_done_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fake: FakeTranscriber, recordings: Path
) -> None:
    def done_by(*arguments: str) -> list[str]:
        fake.read.clear()
        assert run(monkeypatch, "a.wav", "dir/b.mp3", "silent.wav", "-o", "out", *arguments) == 0
        return list(fake.read)

    everything = ["a.wav", "dir/b.mp3", "silent.wav"]
    assert done_by() == everything
    loads = len(fake.seen)
    assert done_by("--batch-size", "2") == []
    assert len(fake.seen) == loads
    assert "3 of 3 inputs skipped: complete and unchanged" in capsys.readouterr().err
    (recordings / "a.wav").write_text("new")
    assert done_by() == ["a.wav"]
    (recordings / "out" / "b.txt").unlink()
    assert done_by() == ["dir/b.mp3"]
    assert done_by("--overwrite") == everything
    assert done_by("--language", "de") == everything
    assert done_by("--language", "de", "-f", "srt") == everything
    monkeypatch.setattr("quasr.weights.record.identity", lambda folder: f"another than in {folder}")
    assert done_by("--language", "de", "-f", "srt") == everything
    assert done_by("--language", "de", "-f", "srt") == []


@pytest.mark.parametrize(("name", "kept"), [("stop", ["a", "stop"]), ("twice", ["a"])])
def test_ctrl_c_keeps_what_is_done_and_sums_up(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fake: FakeTranscriber,
    recordings: Path,
    name: str,
    kept: list[str],
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    assert run(monkeypatch, "a.wav", f"{name}.wav", "dir/b.mp3", "-o", "out") == main.INTERRUPTED
    captured = capsys.readouterr()
    assert f"interrupted: {len(kept)} of 3 inputs are done; run the same command again" in captured.err
    assert f"audio {2.0 * len(kept)} s, wall " in captured.err
    assert sorted(path.stem for path in (recordings / "out").glob("[!.]*")) == kept
    assert "dir/b.mp3" not in fake.read
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_interrupt_that_was_swallowed_writes_nothing() -> None:
    with Interrupt() as interrupt:
        interrupt.result()
        signal.raise_signal(signal.SIGINT)
        interrupt.result()
        with pytest.raises(KeyboardInterrupt):
            interrupt.rest()
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.result()


def test_within_a_long_file_the_second_batch_stops() -> None:
    with Interrupt() as interrupt:
        interrupt.batch()
        interrupt.batch()
        signal.raise_signal(signal.SIGINT)
        interrupt.batch()
        with pytest.raises(KeyboardInterrupt):
            interrupt.batch()


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
            interrupt.rest()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fake: FakeTranscriber, recordings: Path
) -> None:
    allowed = os.access
    # The tests may run as root, whom no mode stops.
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(recordings) and allowed(path, mode))
    assert run(monkeypatch, "a.wav", "-o", str(recordings / "new" / "folder")) == 2
    assert capsys.readouterr().err.endswith("folder cannot be written to: choose another output folder\n")
    (recordings / "plain").touch()
    assert run(monkeypatch, "a.wav", "-o", str(recordings / "plain" / "folder")) == 2
    assert fake.read == []


def jobs(folder: Path, *rows: dict[str, str]) -> str:
    path = folder / "jobs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def test_jobs_give_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fake: FakeTranscriber, recordings: Path
) -> None:
    for name in ("a.wav", "dir/b.mp3", "bad.wav"):
        monkeypatch.setitem(ANSWERS, str(recordings / name), ANSWERS[name])
    path = jobs(
        recordings,
        {"path": "a.wav", "language": "de"},
        {"path": "bad.wav", "id": "broken"},
        {"path": "dir/b.mp3", "context": "Ohm"},
        {"path": "silent.wav", "language": "xx"},
        {"url": "https://host/talks/day%201.mp3?secret=1"},
    )
    assert run(monkeypatch, "--jobs", path, "--context", "names") == 1
    captured = capsys.readouterr()
    found = {line["id"]: line for line in map(json.loads, captured.out.splitlines())}
    assert found["a.wav"]["text"] == "Grüße, first."
    assert found["broken"] == {"id": "broken", "path": "bad.wav", "error": "bad.wav is not audio"}
    assert found["dir/b.mp3"]["segments"][0]["text"] == "Second."
    assert found["silent.wav"]["error"] == "xx is no language"
    assert found["https://host/talks/day%201.mp3?secret=1"]["text"] == "From afar."
    assert len(captured.out.splitlines()) == len(found) == 5
    asked = [(options.language, options.context) for options, _ in fake.seen]
    assert asked == [("de", "names"), (None, "names"), (None, "Ohm")]
    assert "secret" not in captured.err


def test_jobs_in_a_file_go_on_by_their_ids(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fake: FakeTranscriber, recordings: Path
) -> None:
    for name in ("a.wav", "dir/b.mp3", "bad.wav"):
        monkeypatch.setitem(ANSWERS, str(recordings / name), ANSWERS[name])
    out = recordings / "out.jsonl"
    path = jobs(recordings, {"path": "a.wav", "id": "1"}, {"path": "bad.wav", "id": "2"})
    assert run(monkeypatch, "--jobs", path, "-o", str(out)) == 1
    path = jobs(recordings, {"path": "a.wav", "id": "1"}, {"path": "dir/b.mp3", "id": "2"})
    fake.read.clear()
    assert run(monkeypatch, "--jobs", path, "-o", str(out)) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1 of 2 inputs skipped" in captured.err
    assert fake.read == [str(recordings / "dir/b.mp3")]
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["text"]) for line in lines] == [("1", "Grüße, first."), ("2", "Second.")]


@pytest.mark.parametrize(
    ("done", "total", "elapsed", "text"),
    [
        (30.0, 120.0, 10.0, "[######------------------]  25%  30 of 120 s of audio, 3.0 s a second, 0:30 left"),
        (130.0, 120.0, 10.0, f"[{'#' * 24}] 100%  130 of 120 s of audio, 13.0 s a second, 0:00 left"),
        (0.0, 120.0, 0.0, f"[{'-' * 24}]   0%  0 of 120 s of audio, 0.0 s a second, ? left"),
        (30.0, None, 10.0, "30 s of audio done, 3.0 s a second"),
    ],
)
def test_progress_in_words(done: float, total: float | None, elapsed: float, text: str) -> None:
    assert progress_text(done, total, elapsed) == text


def test_durations_as_clocks() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.6, 61, 3600, 36061)] == [
        "0:00", "1:00", "1:01", "1:00:00", "10:01:01",
    ]  # fmt: skip


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    silent = ProgressLine(10.0)
    silent(5.0)
    silent.clear()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    shown = ProgressLine(10.0)
    shown(5.0)
    shown(2.0)
    first, second = capsys.readouterr().err.split("\r\x1b[2K")[1:]
    assert first.startswith("[############------------]  50%")
    assert second.startswith("[############------------]  50%")
    assert max(map(len, (first, second))) == 39
