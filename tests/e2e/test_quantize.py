"""`quasr quantize` and what its folders do in `quasr transcribe`, on a tiny random checkpoint."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

import quasr
from quasr.cli import main
from quasr.errors import OptionError

Refused: TypeAlias = Callable[..., str]

QUASR = str(Path(sys.executable).with_name("quasr"))


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([QUASR, *map(str, words)], capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the program in this process, and returns the one line that it ends with, exit code 2."""

    def end(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [QUASR, *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main.run()
        assert caught.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    return end


@pytest.fixture(scope="module")
def saved(original: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in int8 with a rule in 4 bits, and what was printed."""
    folder = tmp_path_factory.mktemp("quantised") / "int8"
    rule = "decoder.layers.*.mlp.down_proj=int4-g32"
    done = run("quantize", original, "--to", "int8", "--rule", rule, "-o", folder, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_recipe_is_printed(saved: tuple[Path, str]) -> None:
    lines = saved[1].splitlines()
    assert lines[0].split() == ["layers", "scheme", "count", "parameters", "bytes"]
    assert lines[1].split()[:4] == ["decoder.layers.*.mlp.down_proj", "int4-g32", "2", "9,216"]
    assert "MB before" in lines[-1]
    assert "MB after" in lines[-1]


def test_the_folder_says_what_the_source_says_in_int8(saved: tuple[Path, str], original: Path, wav: Path) -> None:
    with quasr.load(saved[0], device="cpu") as transcriber, quasr.load(original, device="cpu") as plain:
        info, text = transcriber.info, transcriber.transcribe(wav, max_new_tokens=12)
        assert plain.info.weight_bytes == 2 * 172_512
        assert plain.info.scheme == "none"
        assert plain.transcribe(wav, max_new_tokens=12).timings.tokens == text.timings.tokens
    assert info.scheme == "int8 with rules"
    assert info.dtype == "fp32"
    assert info.weight_bytes < 0.4 * plain.info.weight_bytes


@pytest.mark.slow
def test_saved_and_quantised_on_load_say_the_same(original: Path, wav: Path, tmp_path: Path) -> None:
    assert run("quantize", original, "--to", "int8", "-o", tmp_path / "q", "--dtype", "fp32").returncode == 0
    with (
        quasr.load(tmp_path / "q", device="cpu") as one,
        quasr.load(original, device="cpu", compute_type="int8") as two,
    ):
        assert one.info == two.info
        options = quasr.TranscribeOptions(max_new_tokens=20)
        assert one.transcribe(wav, options).segments == two.transcribe(wav, options).segments


@pytest.mark.parametrize(
    ("compute_type", "scheme"),
    [
        ("int8", "int8 in fp32"),
        pytest.param("llm-int8", "llm-int8:4.0 in fp32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_transcribe_in_a_compute_type(original: Path, wav: Path, compute_type: str, scheme: str) -> None:
    words = ["transcribe", wav, "--model", original, "--compute-type", compute_type, "--max-new-tokens", "8"]
    extra = ["--threshold", "4"] if compute_type == "llm-int8" else []
    done = run(*words, *extra, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert f"torch on cpu, {scheme}" in done.stderr
    assert "MatMul8bitLt" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "int9"], "did you mean int8"),
        (["--to", "bf16"], "quantises nothing"),
        (["--to", "int8", "--method", "magic"], "unknown method 'magic'"),
        (["--to", "int8", "--group", "48"], "int8-g48"),
        (["--to", "int4"], "groups of 128 do not divide"),
        (["--to", "int8", "--rule", "encoder.layers.*=int4-g32"], "below 8 bits"),
        (["--to", "int8", "--threshold", "4"], "goes with llm-int8"),
    ],
)
def test_wrong_wishes_write_nothing(
    refused: Refused, original: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    assert message in refused("quantize", original, *words, "-o", tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_touched(
    refused: Refused, original: Path, saved: tuple[Path, str], tmp_path: Path
) -> None:
    assert "already exists" in refused("quantize", original, "--to", "int8", "-o", saved[0])
    assert "already quantised" in refused("quantize", saved[0], "--to", "int8", "-o", tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_contradictions(original: Path, saved: tuple[Path, str]) -> None:
    with pytest.raises(OptionError, match="contradict"):
        quasr.load(original, device="cpu", dtype="fp32", compute_type="bf16")
    with pytest.raises(OptionError, match="already quantised as int8 with rules"):
        quasr.load(saved[0], device="cpu", compute_type="int4")
    assert quasr.load(original, device="cpu", compute_type="bf16").info.dtype == "bf16"
