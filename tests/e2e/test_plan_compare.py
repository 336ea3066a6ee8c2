"""`quasr plan`, `--memory`, `--offload` and `quasr compare` on a tiny random checkpoint."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from made_sound import write_wav

import quasr
from quasr.cli import main
from quasr.errors import OptionError, ResourceError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Quasr = Callable[..., Done]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Quasr:
    """Runs the program inside this process."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["quasr", *map(str, arguments)])
        code = main._exit_code()
        return Done(code, *capfd.readouterr())

    return run


def least(stderr: str) -> str:
    found = re.search(r"nothing fits into \S+: the least is (\S+), with", stderr)
    assert found, stderr
    return found[1]


def test_plan_reads_no_weights_and_shows_every_scheme(original: Path, tmp_path: Path, program: Quasr) -> None:
    (tmp_path / "config.json").write_bytes((original / "config.json").read_bytes())
    done = program("plan", tmp_path, "--memory", "4GB", "--audio", "30m", "--device", "cuda")
    assert done.returncode == 0, done.stderr
    header, *rows, chosen = done.stdout.splitlines()
    assert header.split()[:3] == ["compute", "type", "dtype"]
    assert [row.split()[0] for row in rows] == [
        "bf16", "int8", "int4-g32", "int4-g64", "int4", "llm-int8", "nf4",
    ]  # fmt: skip
    assert chosen.startswith("chosen: bf16, clips of up to 30 s, batches of 8: ")
    assert "measured on one GPU" in done.stderr
    assert "int4: " in done.stderr  # its groups do not divide this network


def test_plan_without_a_fit_names_a_budget_that_fits(original: Path, program: Quasr) -> None:
    done = program("plan", original, "--memory", "9MB", "--device", "cpu")
    assert done.returncode == 4
    assert "no" in done.stdout.split()
    again = program("plan", original, "--memory", least(done.stderr), "--device", "cpu")
    assert again.returncode == 0
    assert "chosen: " in again.stdout


@pytest.mark.parametrize(
    "words",
    [("--memory", "4"), ("--memory", "4GB", "--audio", "long"), ("--memory", "4GB", "--device", "tpu"),
     ("--memory", "4GB", "--dtype", "fp8"), ()],
)  # fmt: skip
def test_plan_refuses_what_makes_no_sense(original: Path, program: Quasr, words: tuple[str, ...]) -> None:
    done = program("plan", original, *words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_transcribe_within_a_budget(hf: Path, wav: Path, program: Quasr) -> None:
    words = ("transcribe", wav, "--model", hf, "--device", "cpu", "--max-new-tokens", "8")
    refused = program(*words, "--memory", "9MB")
    assert (refused.returncode, refused.stdout) == (4, "")
    plain = program(*words)
    done = program(*words, "--memory", "2GB")
    assert (done.returncode, done.stdout) == (0, plain.stdout)
    assert "fp32, clips of up to 30 s, batches of 8: " in done.stderr
    assert program(*words, "--memory", least(refused.stderr)).returncode == 0


def test_load_within_a_budget(hf: Path) -> None:
    with quasr.load(hf, device="cpu", memory="2GB", batch_size=3) as transcriber:
        assert transcriber.defaults == quasr.TranscribeOptions(batch_size=3)
        assert transcriber.info.dtype == "fp32"
        for more in ({"batch_size": 4}, {"piece_seconds": 31.0}):
            with pytest.raises(OptionError, match="beyond the memory plan, which allows 30 s and 3"):
                transcriber.transcribe_batch([], **more)
    with pytest.raises(ResourceError, match="nothing fits"):
        quasr.load(hf, device="cpu", memory="9MB")
    with pytest.raises(OptionError, match="either memory or offload"):
        quasr.load(hf, device="cpu", memory="4GB", offload=2)


@pytest.mark.slow
def test_uncut_audio_keeps_to_a_budget(hf: Path, tmp_path: Path, program: Quasr) -> None:
    long = write_wav(tmp_path / "long.wav", 31.0)
    words = ("transcribe", long, "--model", hf, "--device", "cpu", "--max-new-tokens", "2", "--memory", "2GB")
    refused = program(*words, "--chunk", "none")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "longer than the 30 s that the memory plan allows uncut" in refused.stderr
    done = program(*words, "--chunk", "qwen")
    assert done.returncode == 0
    assert "cut about every 25 s and not every 20 minutes" in done.stderr


def test_offloaded_layers_say_the_same(hf: Path, wav: Path, program: Quasr) -> None:
    words = ("transcribe", wav, "--model", hf, "--device", "cpu", "--max-new-tokens", "12")
    done = program(*words, "--offload", "2")
    assert (done.returncode, done.stdout) == (0, program(*words).stdout)
    assert "2 of 2 decoder layers stay in main memory: slower" in done.stderr
    assert program(*words, "--offload", "3").returncode == 2


def test_a_quantised_folder_is_its_own_plan(original: Path, tmp_path: Path, program: Quasr) -> None:
    folder = tmp_path / "int8"
    assert program("quantize", original, "--to", "int8", "-o", folder, "--device", "cpu").returncode == 0
    done = program("plan", folder, "--memory", "1GB", "--device", "cpu")
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["int8", "chosen:"]
    assert program("plan", folder, "--memory", "1GB", "--compute-type", "int4").returncode == 2


@pytest.mark.slow
def test_compare_measures_each_and_says_why_one_fails(hf: Path, wav: Path, tmp_path: Path, program: Quasr) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(f'{{"path": "{wav}", "text": "one two"}}\n')
    words = ("compare", hf, manifest, "--device", "cpu", "--max-new-tokens", "6", "--threads", "1")
    done = program(*words, "--precisions", "fp32,int8,int4", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["precision", "fp32", "int8"]
    assert "int4 failed: " in done.stderr
    assert "groups of 128 do not divide" in done.stderr
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    fp32, int8, int4 = report["rows"]
    assert (fp32["agreement"], fp32["changed"], fp32["failed"]) == (1.0, 0, 0)
    assert int8["weight_bytes"] < 0.5 * fp32["weight_bytes"]
    assert "error" in int4
    assert (tmp_path / "out" / "compare.md").is_file()


def test_compare_checks_its_arguments_first(hf: Path, wav: Path, program: Quasr) -> None:
    assert program("compare", hf, wav, "--precisions", "fp32,int9").returncode == 2
    assert program("compare", hf, "none.wav", "--precisions", "fp32").returncode == 2
