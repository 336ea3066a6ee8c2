"""Manifest, run and report, with a transcriber that answers from a table."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from quasr.cli import main
from quasr.cli.options import ModelChoice
from quasr.engine.base import EngineInfo
from quasr.errors import AudioDecodeError, AudioError, OptionError
from quasr.evaluation.manifest import read_manifest
from quasr.evaluation.report import COLUMNS, table, write_json
from quasr.evaluation.run import evaluate, summarise
from quasr.types import Timings, TranscribeOptions, Transcript

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROWS: list[dict[str, Any]] = [
    {"path": "a.wav", "text": "the cat sat", "subset": "s1", "lang": "en", "seconds": 1.0},
    {"path": "b.wav", "text": "a dog ran away", "subset": "s1", "lang": "en", "seconds": 3.0},
    {"path": "c.wav", "text": "你好吗", "subset": "s2", "lang": "zh", "seconds": 2.0},
    {"path": "d.wav", "subset": "noise", "seconds": 5.0},
    {"path": "e.wav", "subset": "noise", "seconds": 4.0},
    {"path": "f.wav", "text": "unreadable", "subset": "s1", "seconds": 0.5},
]
ANSWERS: dict[str, Transcript | AudioError] = {
    "a.wav": Transcript("The cat sat.", "English", 1.0, timings=Timings(audio=1.0, total=0.5)),
    "b.wav": Transcript("A dog", "English", 3.0, finish_reason="length", timings=Timings(audio=3.0, total=0.5)),
    "c.wav": Transcript("你号吗", "Chinese", 2.0),
    "d.wav": Transcript("", "", 5.0),
    "e.wav": Transcript("la la la la", "English", 4.0),
    "f.wav": AudioDecodeError("f.wav is not audio"),
}


class FakeTranscriber:
    def __init__(self) -> None:
        self.order: list[str] = []

    def transcribe_batch(
        self, audios: list[Path], options: TranscribeOptions, *, progress: object
    ) -> Iterator[Transcript | AudioError]:
        assert not options.precise_retry
        for path in audios:
            self.order.append(path.name)
            yield ANSWERS[path.name]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    return path


def test_manifest_rows(manifest: Path) -> None:
    clips = read_manifest(manifest)
    assert [clip.path for clip in clips] == [manifest.parent / row["path"] for row in ROWS]
    assert clips[3].reference is None
    assert [clip.language for clip in clips] == ["en", "en", "zh", "en", "en", "en"]


def test_manifest_norm_and_size_stand_in(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(b"12345")
    path = tmp_path / "m.jsonl"
    path.write_text('{"path": "x.wav", "norm": "hello", "lang": "zh-CN"}')
    (clip,) = read_manifest(path)
    assert (clip.reference, clip.subset, clip.language, clip.size) == ("hello", "all", "zh", 5.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"path": "a"}\n{oops', "line 2: not valid JSON"),
        (b'["a"]', "line 1: expected an object"),
        (b'{"text": "a"}', "line 1: expected an object"),
        (b'{"path": "a", "seconds": "long"}', "line 1: seconds"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_manifests(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(content)
    with pytest.raises(OptionError, match=message):
        read_manifest(path)


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        read_manifest(tmp_path / "none.jsonl")


def test_longest_first_and_back_in_order(manifest: Path) -> None:
    fake = FakeTranscriber()
    outcomes = evaluate(fake, read_manifest(manifest), TranscribeOptions())  # type: ignore[arg-type]
    assert fake.order == ["d.wav", "e.wav", "b.wav", "c.wav", "a.wav", "f.wav"]
    assert [outcome.clip.name for outcome in outcomes] == [row["path"] for row in ROWS]


def test_sums_by_hand(manifest: Path, tmp_path: Path) -> None:
    outcomes = evaluate(FakeTranscriber(), read_manifest(manifest), TranscribeOptions())  # type: ignore[arg-type]
    total = summarise(outcomes)
    assert (total.clips, total.scored, total.empty, total.repeated, total.cut, total.failed) == (6, 3, 1, 1, 1, 1)
    assert total.words.rate == pytest.approx(2 / 7)
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in table(outcomes)}
    assert list(rows) == ["noise", "s1", "s2", "overall"]
    assert rows["s1"]["WER %"] == "28.57"
    assert (rows["s1"]["sub"], rows["s1"]["ins"], rows["s1"]["del"], rows["s1"]["RTF"]) == ("0", "0", "2", "0.250")
    assert (rows["s2"]["WER %"], rows["s2"]["CER %"], rows["s2"]["sub"]) == ("-", "33.33", "1")
    assert (rows["noise"]["WER %"], rows["noise"]["sub"], rows["noise"]["empty"]) == ("-", "-", "1")
    report = tmp_path / "out.json"
    write_json(report, "demo", EngineInfo("torch", "cpu", "fp32", 1), outcomes)
    read = json.loads(report.read_text(encoding="utf-8"))
    assert read["overall"]["wer"] == pytest.approx(2 / 7)
    assert [clip["hypothesis"] for clip in read["clips"]] == ["The cat sat.", "A dog", "你号吗", "", "la la la la", ""]
    assert read["clips"][5]["error"] == "f.wav is not audio"


def test_unwritable_report(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be written"):
        write_json(tmp_path / "no" / "out.json", "demo", EngineInfo("torch", "cpu", "fp32", 1), [])


def test_ctrl_c_ends_an_evaluation_without_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], manifest: Path, tmp_path: Path
) -> None:
    class Slow(FakeTranscriber):
        info = EngineInfo("fake", "cpu", "fp32", 1)

        def transcribe_batch(
            self, audios: list[Path], options: TranscribeOptions, *, progress: Any
        ) -> Iterator[Transcript | AudioError]:
            for number, answer in enumerate(super().transcribe_batch(audios, options, progress=progress)):
                if number == 1:
                    signal.raise_signal(signal.SIGINT)  # asks, and is no exception where the audio is decoded
                    signal_was_no_exception.append(number)
                progress(1.0)
                yield answer

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    signal_was_no_exception: list[int] = []
    slow, handler = Slow(), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(ModelChoice, "load", lambda _: slow)
    monkeypatch.setattr(sys, "argv", ["quasr", "eval", str(manifest), "-o", str(tmp_path / "report.json")])
    assert main._exit_code() == main.INTERRUPTED
    captured = capsys.readouterr()
    assert (captured.out, signal_was_no_exception, len(slow.order)) == ("", [1], 2)
    assert captured.err.splitlines()[-1] == "interrupted: no figures, because an evaluation is of all clips"
    assert not (tmp_path / "report.json").exists()
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_ends_a_measuring_process_though_exceptions_are_swallowed() -> None:
    swallow = (
        "import signal, sys\nfrom quasr.evaluation.process import end_at_interrupt\nend_at_interrupt()\n"
        "try:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    pass\nprint('went on')"
    )
    signal_free = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    ended = subprocess.run([sys.executable, "-c", swallow], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGINT, "")
    under_nohup = subprocess.run(
        [sys.executable, "-c", signal_free + swallow], capture_output=True, text=True, check=True
    )
    assert under_nohup.stdout == "went on\n"
