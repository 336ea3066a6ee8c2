"""What Triton makes of the kernels' loops for Hopper: compiled here, for a GPU that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = ["product of codes", "product of nibbles", "head", "gate and up", "attention of prompts"]


def loops(ttgir: str) -> list[list[bool]]:
    """Of each loop that has products, those that its end does not wait for: whether they read registers.

    `pendings` of a wait is how many of the newest products may go on.
    """
    found: list[list[bool]] = []
    running: list[list[bool]] = []
    for line in ttgir.splitlines():
        if "scf.for" in line:
            running.append([])
        elif not running:
            continue
        elif "ttng.warp_group_dot_wait" in line:
            left = int(line.partition("pendings = ")[2].partition(" ")[0])
            running[-1] = running[-1][len(running[-1]) - left :]
        elif "ttng.warp_group_dot " in line:
            running[-1].append("opIdx = 0" in line.partition("->")[0])
        elif "scf.yield" in line:
            found.append(running.pop())
    return found


def test_loops_are_read_as_they_are_meant() -> None:
    """Made up: the second product of registers, and one of shared memory, go on beyond the end of the loop."""
    lines = [
        "%a = scf.for %i = %b to %c",
        "%d = ttng.warp_group_dot %r, %s, %a {isAsync = true} : tensor<#dot_op<{opIdx = 0}>> * !memdesc -> t",
        "%e:2 = ttng.warp_group_dot_wait %d, %s {pendings = 0 : i32}",
        "%f = ttng.warp_group_dot %r, %s, %e {isAsync = true} : tensor<#dot_op<{opIdx = 0}>> * !memdesc -> t",
        "%g = ttng.warp_group_dot %s, %s, %f {isAsync = true} : !memdesc * !memdesc -> tensor<#dot_op<{opIdx = 0}>>",
        "%h:2 = ttng.warp_group_dot_wait %g, %s {pendings = 2 : i32}",
        "scf.yield %h",
    ]
    assert loops("\n".join(lines)) == [[True, False]]
    assert loops("\n".join(lines).replace("pendings = 2", "pendings = 1")) == [[False]]


def compiled(*arguments: str) -> dict[str, list[list[bool]]]:
    """Of each kernel the loops that Triton made of it."""
    told = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_for_hopper.py")), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert list(found) == KERNELS
    assert all("ttng.warp_group_dot " in ttgir for ttgir in found.values())
    return {name: loops(ttgir) for name, ttgir in found.items()}


@pytest.mark.slow
def test_no_loop_ends_while_products_read_registers() -> None:
    """The next step would write to them: products of 70 rows of an int8 model in fp16 were wrong now and then."""
    for name, ends in compiled().items():
        assert ends, name
        assert not any(chain.from_iterable(ends)), name


@pytest.mark.slow
def test_without_the_wait_they_would() -> None:
    """Else the test above would see nothing. Nibbles have a scale for each step, which uses the sums."""
    ends = compiled("unsettled")
    assert {name for name in KERNELS if any(chain.from_iterable(ends[name]))} == set(KERNELS) - {"product of nibbles"}
