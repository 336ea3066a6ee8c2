"""`quasr quantize --method gptq|awq` on a tiny random checkpoint: the folder, an interruption, wrong wishes."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
from made_sound import write_wav
from safetensors.torch import load_file

import quasr
from quasr.cli import calibration, main
from quasr.quant import calibrate as driver
from quasr.quant.store import read_saved

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

RULES = ["--to", "int8", "--rule", "decoder.layers.*.mlp.down_proj=int4-g32", "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips."""
    folder = tmp_path_factory.mktemp("clips")
    names = [write_wav(folder / f"{index}.wav", 0.6 + 0.3 * index).name for index in range(3)]
    path = folder / "manifest.jsonl"
    path.write_text("".join(f"{json.dumps({'path': name})}\n" for name in names))
    return path


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(monkeypatch, capsys)


class Program:
    """`quasr quantize` in this process: exit code and the last line of standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: str | Path) -> tuple[int, str]:
        self._monkeypatch.setattr(sys, "argv", ["quasr", "quantize", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main.run()
        lines = self._capsys.readouterr().err.splitlines()
        return int(caught.value.code or 0), lines[-1] if lines else ""


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_folder_loads_and_says_how_it_was_made(
    program: Program, original: Path, manifest: Path, wav: Path, tmp_path: Path, method: str
) -> None:
    output = tmp_path / "q"
    code, last = program(original, *RULES, "--method", method, "--calibration", manifest, "-o", output)
    assert code == 0, last
    saved = read_saved(output)
    assert saved is not None
    assert saved.metadata == {"method": method, "calibration_clips": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    with quasr.load(output, device="cpu") as transcriber:
        assert transcriber.transcribe(wav, max_new_tokens=4).timings.tokens > 0


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    program: Program, original: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: Sequence[str | Path] = [original, *RULES, "--method", "gptq", "--calibration", manifest, "-o"]
    assert program(*words, tmp_path / "whole")[0] == 0
    keep = driver._keep

    def pull_the_plug(*arguments: object) -> None:
        keep(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(driver, "_keep", pull_the_plug)
        assert program(*words, tmp_path / "q")[0] != 0
    assert not (tmp_path / "q").exists()
    assert "add --resume" in program(*words, tmp_path / "q")[1]
    monkeypatch.setattr(calibration, "_write_answers", None)  # what was transcribed is not transcribed again
    assert program(*words, tmp_path / "q", "--resume")[0] == 0
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "q"))
    assert {name: tensor.numpy().tobytes() for name, tensor in whole.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in resumed.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "whole"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "gptq"], "needs --calibration"),
        (["--resume"], "rtn needs no clips"),
        (["--method", "awq", "--calibration", "missing.jsonl"], "cannot be read"),
    ],
)
def test_wrong_wishes_write_nothing(
    program: Program, original: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    code, last = program(original, *RULES, *words, "-o", tmp_path / "q")
    assert code == 2
    assert message in last
    assert list(tmp_path.iterdir()) == []


def test_gptq_without_four_bits_is_refused(program: Program, original: Path, manifest: Path, tmp_path: Path) -> None:
    words = ["--to", "int8", "--method", "gptq", "--calibration", manifest, "-o", tmp_path / "q"]
    assert "for 4 bits, and int8 has none" in program(original, *words)[1]


def test_answers_of_another_number_of_clips_are_refused(
    program: Program, original: Path, manifest: Path, tmp_path: Path
) -> None:
    (tmp_path / "q.work").mkdir()
    (tmp_path / "q.work" / "answers.json").write_text("[[1, 2]]")
    words = ["--method", "gptq", "--calibration", manifest, "--resume", "-o", tmp_path / "q"]
    assert "is of 1 clips, the manifest has 3" in program(original, *RULES, *words)[1]
