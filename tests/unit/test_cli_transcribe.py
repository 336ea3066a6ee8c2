"""`quasr transcribe` around a transcriber that answers from a table."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Self

import pytest

from quasr.cli import main
from quasr.cli.options import ModelChoice
from quasr.engine.base import EngineInfo
from quasr.errors import AudioDecodeError, AudioError
from quasr.types import Notice, Segment, TranscribeOptions, Transcript

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from quasr.audio.fetch import FetchLimits


def said(text: str, *warnings: Notice) -> Transcript:
    segments = (Segment(0, 0.0, 2.0, text, "English"),) if text else ()
    return Transcript(text, "English" if text else "", 2.0, segments, warnings=warnings)


ANSWERS: dict[str, Transcript | AudioError] = {
    "a.wav": said("Grüße, first."),
    "dir/b.mp3": said("Second."),
    "silent.wav": said(""),
    "cut.wav": said("Cut", Notice("token_budget", "stopped early", 0.0, 2.0)),
    "bad.wav": AudioDecodeError("bad.wav is not\naudio"),
    "https://host/talks/day%201.mp3?secret=1": said("From afar."),
    "other/a.flac": said("Same stem."),
}


class FakeTranscriber:
    info = EngineInfo("fake", "cpu", "fp32", 1)
    seen: list[tuple[TranscribeOptions, FetchLimits]]
    defaults: TranscribeOptions

    def __init__(self) -> None:
        self.seen = []

    def transcribe_batch(
        self, audios: list[str], options: TranscribeOptions, *, limits: FetchLimits, progress: object
    ) -> Iterator[Transcript | AudioError]:
        self.seen.append((options, limits))
        return (ANSWERS[source] for source in audios)

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
    assert "warning: cut.wav: stopped early" in captured.err


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
