from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quasr import __version__
from quasr.cli import main
from quasr.cli.terminal import ProgressLine, note
from quasr.errors import CheckpointError, OptionError, ResourceError
from quasr.weights.hub import DEMO_FOLDER

HEAVY = ("torch", "numpy", "av", "soxr", "tokenizers", "huggingface_hub", "jiwer", "transformers")


def run_with(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["quasr", *arguments])
    return main._exit_code()


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['quasr', '--help']\nfrom quasr.cli.main import run\n"
        f"try:\n    run()\nfinally:\n    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    times = []
    for _ in range(3):
        before = children_seconds()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(children_seconds() - before)
        assert done.stderr == "[]\n"
        assert all(command in done.stdout for command in ("transcribe", "eval", "doctor"))
    # Processor time, which other processes do not stretch as they do wall time.
    assert min(times) < 0.3


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"quasr {__version__}\n"


@pytest.mark.parametrize("arguments", [("nonsense",), ("transcribe",), ("transcribe", "x", "--batch-size", "0"), ()])
def test_wrong_arguments_are_one_line_and_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert run_with(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (OptionError("wrong\nin two lines"), 2, "error: wrong in two lines\n"),
        (CheckpointError("damaged"), 3, "error: damaged\n"),
        (ResourceError("no memory"), 4, "error: no memory\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_a_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: BaseException, code: int, line: str
) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr("quasr.cli.doctor._findings", fail)
    assert run_with(monkeypatch, "doctor") == code
    assert capsys.readouterr().err.lstrip("\n") == line


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    code = "import sys\nsys.argv = ['quasr', 'doctor']\nfrom quasr.cli.main import run\nrun()"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (main.BROKEN_PIPE, "")


CLOSE_ALL = """
import os, sys
for number in (0, 1, 2):
    os.close(number)
for name in ("stdin", "stdout", "stderr"):
    setattr(sys, name, None)
from quasr.cli.terminal import note, open_closed_streams, result
from quasr.errors import ResourceError
open_closed_streams()
assert sys.stdin.read() == ""
note("nobody sees it")
try:
    result("lost")
except ResourceError as error:
    os._exit(7 if "standard output cannot be written" in str(error) else 8)
"""


def test_streams_that_the_shell_has_closed() -> None:
    assert subprocess.run([sys.executable, "-c", CLOSE_ALL], check=False).returncode == 7


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")


def program(*arguments: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    code = f"import sys\nsys.argv = {['quasr', *arguments]}\nfrom quasr.cli.main import run\nrun()"
    return subprocess.run([sys.executable, "-c", code], text=True, check=False, **streams)


@FULL
@pytest.mark.parametrize("arguments", [["doctor"], ["--version"], ["--help"], ["transcribe", "--help"]])
def test_standard_output_on_a_full_disk_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = program(*arguments, stdout=full, stderr=subprocess.PIPE)
    line = "error: standard output cannot be written (No space left on device): send it elsewhere\n"
    assert (done.returncode, done.stderr) == (ResourceError.exit_code, line)


@FULL
def test_notes_on_a_full_disk_are_not_seen_and_stop_nothing() -> None:
    with open("/dev/full", "wb") as full:
        done = program("transcribe", str(DEMO_FOLDER.parent / "sample.flac"), stdout=subprocess.PIPE, stderr=full)
        assert (done.returncode, done.stdout.count("\n")) == (0, 1)
        assert program("--nix", stderr=full).returncode == 2


@pytest.mark.parametrize("place", ["plain/out.json", "folder"])
def test_an_evaluation_without_a_place_for_its_figures_does_not_begin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, place: str
) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "clips.jsonl").write_text('{"path": "a.wav", "text": "a"}\n')
    assert run_with(monkeypatch, "eval", str(tmp_path / "clips.jsonl"), "-o", str(tmp_path / place)) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert str(tmp_path / place) in captured.err


def test_a_comparison_without_a_place_for_its_figures_does_not_begin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "plain").touch()
    assert run_with(monkeypatch, "compare", "demo", "a.wav", "-o", str(tmp_path / "plain" / "out")) == 2
    assert capsys.readouterr().err.endswith("cannot be written to: choose another output folder\n")


def test_a_note_is_one_line_whatever_a_file_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    note("talk\n\x1b[2J\udcff é.wav")
    assert capsys.readouterr().err == "talk??[2J? é.wav\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_terminal_that_goes_away_stops_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as gone:
        monkeypatch.setattr(gone, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stderr", gone)
        progress = ProgressLine(10.0)
        assert progress.shown
        progress(5.0)
        progress.clear()
        assert not progress.shown
        gone.write("what comes later goes nowhere")
