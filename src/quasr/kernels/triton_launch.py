"""How Triton kernels are launched: programmatic dependent launch, the interpreter that runs them on a CPU, and when
Hopper's products have ended."""

from __future__ import annotations

import os
import sys
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents as gdc_launch
from triton.language.extra.cuda import gdc_wait

from quasr.kernels import cuda_module

__all__ = [
    "INTERPRETED",
    "WARP_GROUP",
    "block",
    "gdc_launch",
    "gdc_wait",
    "launch_options",
    "pdl_works",
    "program_memory",
    "settled",
    "tensor_cores",
    "wide_fits",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run on the CPU, slowly, to be tested."""

TENSOR_CORE_CAPABILITY, FIRST_PDL_CAPABILITY = (8, 0), (9, 0)
"""CUDA compute capabilities of Ampere and of Hopper, the first generation with programmatic dependent launch."""

WIDE_BYTES = 144 << 10
"""Of shared memory, that attention takes at most in fp32: 143,424 for one row, 131,584 for a window of the encoder."""

WARP_GROUP = 4
"""Warps that multiply together on Hopper."""


@triton.jit
def settled(sums):
    """sums in fp32, once the products that make them have ended. The interpreter does not know it.

    Products of Hopper's warp groups may read one of their factors out of registers, and while they run. Before 3.7
    Triton lets the next step of a loop write to those registers (triton-lang/triton#9433): wrong results, now and then.
    A use of the sums in the loop, which is no instruction, makes it wait for them.
    """
    return tl.inline_asm_elementwise("", "=f,0", [sums], dtype=tl.float32, is_pure=True, pack=1)


@cache
def pdl_works(device: torch.device) -> bool:
    """Whether a kernel can start before the one before it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_PDL_CAPABILITY


@cache
def tensor_cores(device: torch.device) -> bool:
    """Whether Triton compiles products of 16 bits for the tensor cores, which it does from Ampere on."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= TENSOR_CORE_CAPABILITY


@cache
def program_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; the interpreter has no such limit."""
    return sys.maxsize if device.type == "cpu" else cuda_module.shared_memory(cuda_module.index(device))


def wide_fits(x: torch.Tensor) -> bool:
    """Whether attention to `x` may take blocks of the usual size: where the tensor cores do not multiply, factors lie
    in shared memory as fp32, and GPUs for games have too little of it."""
    light = x.dtype != torch.float32 and tensor_cores(x.device)
    return light or program_memory(x.device) >= WIDE_BYTES


def launch_options(warps: int, pdl: bool, stages: int = 3) -> dict[str, int | bool]:
    """Keyword arguments of a launch. The interpreter knows no dependent launch."""
    options: dict[str, int | bool] = {"num_warps": warps, "num_stages": stages}
    return {**options, "launch_pdl": True} if pdl else options


def block(size: int, least: int = 1, most: int = 1 << 20) -> int:
    """The power of two that holds `size`, within bounds."""
    return min(max(int(triton.next_power_of_2(size)), least), most)
