"""How Triton kernels are launched: programmatic dependent launch, and the interpreter that runs them on a CPU."""

from __future__ import annotations

import os
from functools import cache

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents as gdc_launch
from triton.language.extra.cuda import gdc_wait

__all__ = ["INTERPRETED", "block", "gdc_launch", "gdc_wait", "launch_options", "pdl_works"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run on the CPU, slowly, to be tested."""

FIRST_PDL_CAPABILITY = (9, 0)
"""CUDA compute capability of Hopper, the first generation with programmatic dependent launch."""


@cache
def pdl_works(device: torch.device) -> bool:
    """Whether a kernel can start before the one before it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_PDL_CAPABILITY


def launch_options(warps: int, pdl: bool, stages: int = 3) -> dict[str, int | bool]:
    """Keyword arguments of a launch. The interpreter knows no dependent launch."""
    options: dict[str, int | bool] = {"num_warps": warps, "num_stages": stages}
    return {**options, "launch_pdl": True} if pdl else options


def block(size: int, least: int = 1, most: int = 1 << 20) -> int:
    """The power of two that holds `size`, within bounds."""
    return min(max(int(triton.next_power_of_2(size)), least), most)
