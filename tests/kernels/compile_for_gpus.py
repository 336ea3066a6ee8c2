"""Compiles what an engine launches for a GPU that is not here; prints the most shared memory of each kernel as JSON.

    python tests/kernels/compile_for_gpus.py CAPABILITY DTYPE MEMORY ROWS...

CAPABILITY: 86 for 8.6; DTYPE: fp32, fp16 or bf16; MEMORY: bytes of shared memory that a program may have there; ROWS:
of steps. Tensors are torch's meta tensors of the 1.7B shape, which have no numbers; Triton compiles, ptxas assembles,
and nothing is launched. A process of its own, because where tests run Triton interprets kernels.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from quasr.kernels import cuda_module, dispatch
from quasr.kernels.matrix import Heads, LayerNorm, Matrix, Norm
from quasr.kernels.state import DecodeState, Places, Prompts

if TYPE_CHECKING:
    from quasr.kernels.dispatch import Kernels

CAPABILITY, MEMORY = int(sys.argv[1]), int(sys.argv[3])
DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[sys.argv[2]]
ROWS = [int(rows) for rows in sys.argv[4:]]
HIDDEN, FFN, VOCABULARY = 2048, 6144, 151936
AUDIO, AUDIO_HEADS, CHANNELS = 1024, 16, 480

compiled: dict[str, int] = {}
what = ""


class Driver:
    """Of a GPU that is not here."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)


def compile_only(run: Any) -> Any:
    def instead(self: Any, *args: Any, grid: object, warmup: bool, **options: Any) -> Any:
        found = run(self, *args, grid=grid, warmup=True, **options)
        kernel = f"{what}: {self.__name__}"
        compiled[kernel] = max(compiled.get(kernel, 0), found.metadata.shared)
        return found

    return instead


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def matrix(kind: str, rows: int, columns: int) -> Matrix:
    if kind == "floats":
        return Matrix(empty(rows, columns))
    if kind == "int8":
        return Matrix(empty(rows, columns, dtype=torch.int8), empty(rows, 1))
    return Matrix(empty(rows, columns // 2, dtype=torch.uint8), empty(rows, columns // 128))


def decoder(kernels: Kernels) -> None:
    """A step of so many rows, and prompts of as many tokens."""
    norm = Norm(empty(HIDDEN), 1e-6)
    small = Norm(empty(128), 1e-6)
    heads = Heads(16, 8, 128, small, small, empty(64, dtype=torch.float32))
    keys = empty(8, 10_000, 128)
    for rows in ROWS:
        name(f"{rows} rows")
        x, states = empty(rows, HIDDEN, dtype=torch.float32), empty(rows, dtype=torch.int64)
        places = Places(states, states, empty(rows, dtype=torch.bool))
        kernels.attend_step(empty(rows, heads.width), keys, keys, places, heads)
        kernels.attend(
            kernels.rotate_write(empty(rows, heads.width), keys, keys, places, heads), keys, keys, places, heads
        )
        kernels.add_rms_norm(x, empty(rows, HIDDEN), norm)
        state = DecodeState.allocate(rows, 512, (1, 2), torch.device("meta"))
        kernels.advance(state, states, empty(rows, dtype=torch.float32))
        for kind in ("floats", "int8", "int4"):
            name(f"{rows} rows, {kind}")
            kernels.linear(x, matrix(kind, heads.width, HIDDEN), norm)
            kernels.add_linear(empty(rows, HIDDEN), matrix(kind, HIDDEN, HIDDEN), x)
            kernels.gated_linear(x, matrix(kind, 2 * FFN, HIDDEN), norm)
            kernels.add_linear(empty(rows, FFN), matrix(kind, HIDDEN, FFN), x)
            kernels.choose(x, norm, matrix(kind, VOCABULARY, HIDDEN))
    for kind in ("int8", "int4"):
        name(kind)
        kernels.dequantise(matrix(kind, HIDDEN, HIDDEN))
    for kind in ("floats", "int8"):
        name(kind)
        kernels.embed(empty(4, dtype=torch.int64), matrix(kind, VOCABULARY, HIDDEN))
    for prompts in (1, 256):
        name(f"{prompts} prompts")
        begins = empty(prompts, dtype=torch.int64)
        found = Prompts((9,), (0,), empty(prompts + 1, dtype=torch.int64), begins)
        kernels.attend_prompts(empty(9, heads.query_width), keys, keys, found, heads)


def encoder(kernels: Kernels) -> None:
    name("audio")
    kernels.convolve_mel(empty(30, 128, 100, dtype=torch.float32), empty(CHANNELS, 1, 3, 3), empty(CHANNELS))
    kernels.stem_features(empty(30, 16, 13, CHANNELS), empty(CHANNELS))
    kernels.add_norm(
        empty(400, AUDIO, dtype=torch.float32), empty(400, AUDIO), LayerNorm(empty(AUDIO), empty(AUDIO), 1e-5)
    )
    kernels.add_gelu(empty(400, 4 * AUDIO), empty(4 * AUDIO))
    kernels.attend_windows(empty(400, 3 * AUDIO), empty(9, dtype=torch.int32), AUDIO_HEADS, 104)


def name(text: str) -> None:
    global what
    what = text


def main() -> None:
    driver.set_active(Driver())
    JITFunction.run = compile_only(JITFunction.run)
    torch.cuda.get_device_capability = lambda device=None: divmod(CAPABILITY, 10)
    cuda_module.index = lambda device: 0
    cuda_module.shared_memory = lambda device: MEMORY
    kernels = dispatch.triton(torch.device("cuda", 0), DTYPE)
    decoder(kernels)
    encoder(kernels)
    json.dump(compiled, sys.stdout)


if __name__ == "__main__":
    main()
