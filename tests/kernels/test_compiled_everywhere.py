"""All kernels compiled for GPUs that need not be there: nothing asks for more shared memory than they have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_MEMORY = {75: 64 << 10, 86: 99 << 10}
"""Bytes that one program may have: CUDA C++ Programming Guide, technical specifications of compute capabilities."""

KERNELS = {"activation", "attention", "choice", "convolution", "embedding", "matvec", "normalisation", "rotation"}


def compiled(capability: int, dtype: str, *rows: int) -> dict[str, int]:
    """Bytes of shared memory of each kernel, by what it is for."""
    script = Path(__file__).with_name("compile_for_gpus.py")
    told = subprocess.run(
        [sys.executable, script, str(capability), dtype, str(SHARED_MEMORY[capability]), *map(str, rows)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    found: dict[str, int] = json.loads(told.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "rows"),
    [(75, "fp16", (1, 16)), (75, "fp32", (1,)), (86, "bf16", (1, 16, 64, 256)), (86, "fp32", (1, 16))],
    ids=str,
)
def test_every_kernel_fits(capability: int, dtype: str, rows: tuple[int, ...]) -> None:
    """Turing's oldest and what most games run on; Ada and the smaller Blackwells have as much as 8.6."""
    found = compiled(capability, dtype, *rows)
    names = {what.rpartition(": ")[2] for what in found}
    assert names >= KERNELS, names
    assert ("product" in names) == (capability >= 80)
    assert {what: size for what, size in found.items() if size > SHARED_MEMORY[capability]} == {}
