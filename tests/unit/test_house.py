"""The house rules that machines can check: style, types, who may import whom, and what a fresh import costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [("ruff", "check"), ("ruff", "format", "--check"), ("mypy",), ("lint-imports",)],
    ids=lambda command: " ".join(command),
)
def test_tools_find_nothing(command: tuple[str, ...]) -> None:
    done = run(str(BIN / command[0]), *command[1:])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_readme_is_short_enough_to_be_read() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_bundled_model_is_small_enough_to_ship() -> None:
    size = sum(path.stat().st_size for path in (ROOT / "src/quasr/demo").rglob("*") if path.is_file())
    # The weights are there twice: bf16 for torch, int8 for ONNX Runtime.
    assert size <= 70_000_000
