"""The bundled model on ONNX Runtime in processes where torch cannot be imported, as in the base install."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import quasr
from quasr.pipeline.onnx import DEMO_GRAPHS
from quasr.types import SAMPLE_RATE

if TYPE_CHECKING:
    from pathlib import Path

DEMO = DEMO_GRAPHS.parent
TEXT = (DEMO / "sample.txt").read_text(encoding="utf-8").strip()

WITHOUT_TORCH = """
import sys
for name in ("torch", "safetensors", "onnx", "transformers", "scipy", "librosa"):
    sys.modules[name] = None
from quasr.cli.main import run
run()
"""


def quasr_without_torch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=120)


def test_the_sample_is_transcribed() -> None:
    done = quasr_without_torch("transcribe", "--model", "demo", "--threads", "1", DEMO / "sample.flac")
    assert (done.returncode, done.stdout.strip()) == (0, TEXT)
    assert "demo: onnx on cpu, int8" in done.stderr


def test_a_folder_of_graphs_is_a_model() -> None:
    done = quasr_without_torch("transcribe", "--model", DEMO_GRAPHS, "-f", "srt", DEMO / "sample.flac")
    assert done.returncode == 0
    assert done.stdout.startswith("1\n00:00:00,")


def test_doctor_and_help_work() -> None:
    assert quasr_without_torch("--help").returncode == 0
    done = quasr_without_torch("doctor")
    assert done.returncode == 0
    assert "engine torch        cannot run: torch is not installed: pip install 'quasr[cuda]'" in done.stdout
    assert str(DEMO_GRAPHS) in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("--compute-type", "bf16"), 5, "error: torch is not installed: pip install 'quasr[cuda]'"),
        (("--engine", "torch"), 5, "error: torch is not installed: pip install 'quasr[cuda]'"),
        (("--model", DEMO / "model"), 5, "'quasr[quant]' to convert it here"),
        (("--provider", "tensorrt"), 5, "no provider tensorrt: "),
        (("--provider", "npu"), 2, "unknown provider 'npu'"),
        (("--device", "gpu"), 2, "unknown device 'gpu'"),
    ],
)
def test_what_is_missing_is_one_line(arguments: tuple[str | Path, ...], code: int, line: str) -> None:
    done = quasr_without_torch("transcribe", *arguments, DEMO / "sample.flac")
    assert (done.returncode, done.stdout) == (code, "")
    (told,) = done.stderr.splitlines()
    assert line in told


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "demo", "--to", "int8", "-o", "out"),
        ("export", "demo", "--weights", "int8", "-o", "out"),
        ("plan", "demo", "--memory", "4GB"),
        ("bench", "--shape", "1.7b"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_that_need_torch_say_so_in_one_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = quasr_without_torch(*(str(tmp_path / "out") if one == "out" else one for one in arguments))
    assert (done.returncode, done.stdout) == (5, "")
    (told,) = done.stderr.splitlines()
    assert "torch" in told
    assert "pip install 'quasr[" in told


def test_the_library_imports_no_torch() -> None:
    code = (
        "import sys, quasr\n"
        f"with quasr.load() as model: print(model.transcribe({str(DEMO / 'sample.flac')!r}).text)\n"
        "assert not {'torch', 'safetensors', 'onnx'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout.strip()) == (0, TEXT), done.stderr


def test_two_models_and_two_threads_of_callers() -> None:
    """Engines share nothing: each of two, in a thread of its own, says what it says alone."""
    from concurrent.futures import ThreadPoolExecutor

    def text(_: int) -> str:
        with quasr.load("demo", threads=1) as model:
            return model.transcribe(DEMO / "sample.flac").text

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(text, range(2))) == [TEXT, TEXT]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length() -> None:
    """Five times the audio in pieces of at most 30 s: the highest resident memory rises by the decoded sound alone."""
    peaks = [_peak(minutes) for minutes in (1, 5)]
    assert peaks[1] - peaks[0] < 4 * 60 * SAMPLE_RATE * 4 + 30_000_000


def _peak(minutes: int) -> int:
    code = (
        "import numpy as np, quasr, resource\n"
        f"sound = np.random.default_rng(0).standard_normal({minutes} * 60 * 16000).astype(np.float32) * 0.1\n"
        "with quasr.load(threads=1) as model: model.transcribe((sound, 16000), max_new_tokens=20)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    return int(done.stdout)


@pytest.mark.slow
def test_the_whole_process_is_quick() -> None:
    """1.5 s on two idle cores (docs/onnx.md); here the processor's seconds count, for others may share it."""
    started = time.perf_counter()
    before = _children()
    assert quasr_without_torch("transcribe", DEMO / "sample.flac").returncode == 0
    assert _children() - before < 3.0, f"wall {time.perf_counter() - started:.1f} s"


def _children() -> float:
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
