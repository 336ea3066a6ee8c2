"""`quasr` as a program on a tiny random checkpoint: its outputs, its errors, its exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import wave
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest
from made_sound import RATE, write_wav

from quasr.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TIMING = r"audio [\d.]+ s, wall [\d.]+ s, real-time factor [\d.]+, peak memory [\d,.]+ MB"


@dataclass(frozen=True)
class Done:
    """What a run of the program left."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        assert "Traceback" not in self.stderr
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


Quasr = Callable[..., Done]


@pytest.fixture
def quasr(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Quasr:
    """Runs the program inside this process, which saves the import of torch; what libraries print is seen too."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["quasr", *map(str, arguments)])
        code = main._exit_code()
        return Done(code, *capfd.readouterr())

    return run


@pytest.fixture
def transcribe(quasr: Quasr) -> Quasr:
    return partial(quasr, "transcribe", "--device", "cpu", "--max-new-tokens", "8", "--model")


def test_as_a_program_stdout_has_the_transcript_alone(hf: Path, wav: Path, transcribe: Quasr) -> None:
    code = "from quasr.cli.main import run; run()"
    command = [sys.executable, "-W", "error", "-c", code, "transcribe", "--device", "cpu", "--max-new-tokens", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--model", hf, wav], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, transcribe(hf, wav).stdout)
    assert "Traceback" not in done.stderr
    assert re.search(TIMING, done.stderr)


def test_transcript_on_stdout_and_the_rest_on_stderr(hf: Path, wav: Path, transcribe: Quasr) -> None:
    done = transcribe(hf, wav)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "\nwarning: " in done.stderr
    assert re.search(TIMING, done.stderr)
    assert "torch on cpu, fp32" in done.stderr
    assert done.errors == []


def test_files_instead_of_stdout(original: Path, wav: Path, tmp_path: Path, transcribe: Quasr) -> None:
    done = transcribe(original, wav, "-f", "all", "-o", tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    written = {f"sound.{fmt}" for fmt in ("txt", "srt", "vtt", "tsv", "json")}
    assert {path.name for path in tmp_path.iterdir()} == {*written, ".quasr.jsonl"}


def silent_video(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for _ in range(5):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def no_samples(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
    return path


def nan_wav(path: Path) -> Path:
    samples = np.full(RATE, np.nan, "<f4").tobytes()
    head = np.array([16, 3 | 1 << 16, RATE, 4 * RATE, 4 | 32 << 16], "<u4").tobytes()
    body = b"WAVEfmt " + head + b"data" + np.uint32(len(samples)).tobytes() + samples
    path.write_bytes(b"RIFF" + np.uint32(len(body)).tobytes() + body)
    return path


class Handler(BaseHTTPRequestHandler):
    """200 with text at /text, 404 elsewhere."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/text" else 404)
        self.end_headers()
        self.wfile.write(b"<html>this is not audio</html>")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def bad_inputs(folder: Path) -> list[Path]:
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("this is a shopping list, not a sound\n" * 50)
    (folder / "folder").mkdir()
    made = [silent_video(folder / "video.mp4"), no_samples(folder / "zero.wav"), nan_wav(folder / "nan.wav")]
    return [folder / "missing.wav", folder / "folder", folder / "empty.wav", folder / "text.wav", *made]


def test_every_bad_input_is_one_line_and_the_good_one_is_transcribed(
    hf: Path, wav: Path, tmp_path: Path, server: str, transcribe: Quasr
) -> None:
    bad = [*map(str, bad_inputs(tmp_path)), f"{server}/none.wav", f"{server}/text"]
    done = transcribe(hf, *bad, wav, "--allow-private-urls")
    assert done.returncode == 1
    assert done.stdout == transcribe(hf, wav).stdout
    lines = done.errors
    assert len(lines) == len(bad), done.stderr
    for source, line in zip(bad, lines, strict=True):
        assert source in line
    assert f"{len(bad)} of {len(bad) + 1} inputs failed" in done.stderr


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(hf: Path, tmp_path: Path, transcribe: Quasr) -> None:
    path = write_wav(tmp_path / "secret.wav", 0.5)
    path.chmod(0)
    done = transcribe(hf, path)
    assert (done.returncode, done.stdout, len(done.errors)) == (1, "", 1)


def test_private_urls_are_refused_unless_allowed(hf: Path, server: str, transcribe: Quasr) -> None:
    done = transcribe(hf, f"{server}/none.wav")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.errors
    assert "refused" in line


def test_truncated_mp3_is_transcribed_with_a_warning(hf: Path, tmp_path: Path, transcribe: Quasr) -> None:
    whole = tmp_path / "whole.mp3"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("mp3", rate=RATE, layout="mono")
        samples = np.random.default_rng(1).integers(-9000, 9000, (1, 4 * RATE)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = RATE
        for part in [*stream.encode(frame), *stream.encode()]:
            container.mux(part)
    cut = tmp_path / "cut.mp3"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    done = transcribe(hf, cut)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "missing" in done.stderr


def test_model_errors_are_3_and_device_errors_4(wav: Path, tmp_path: Path, quasr: Quasr) -> None:
    done = quasr("transcribe", wav, "--model", tmp_path / "no-such-folder")
    assert (done.returncode, done.stdout, len(done.errors)) == (3, "", 1)
    done = quasr("transcribe", wav, "--device", "cuda:77")
    assert (done.returncode, done.stdout, len(done.errors)) == (4, "", 1)


def test_eval_prints_a_table_and_writes_json(hf: Path, wav: Path, tmp_path: Path, quasr: Quasr) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(f'{{"path": "{wav}", "text": "one two", "subset": "s"}}\n{{"path": "none.wav"}}\n')
    report = tmp_path / "report.json"
    done = quasr("eval", manifest, "--model", hf, "--device", "cpu", "--max-new-tokens", "8", "-o", report)
    assert done.returncode == 1
    header, *rows = done.stdout.splitlines()
    assert header.split()[:3] == ["subset", "clips", "scored"]
    assert [row.split()[0] for row in rows] == ["all", "s", "overall"]
    assert len(done.errors) == 1
    assert report.is_file()


def test_doctor_says_what_would_run(quasr: Quasr) -> None:
    done = quasr("doctor")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^engine torch +would run on ", done.stdout, re.MULTILINE)
    assert re.search(r"^provider cpu +engine onnx would run on cpu", done.stdout, re.MULTILINE)
    assert re.search(r"^memory +cpu: [\d,.]+ MB free of ", done.stdout, re.MULTILINE)
