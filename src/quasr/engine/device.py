"""Where the network runs and in what precision: chosen once, with the reasons kept."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from quasr.errors import MissingDependencyError, OptionError, ResourceError

if TYPE_CHECKING:
    from types import ModuleType

    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Short names, as options spell them, and torch's."""

FIRST_BF16_CAPABILITY = (8, 0)
"""CUDA compute capability of Ampere, the first generation that computes in bf16."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A device, a dtype, and one line for each choice that was made."""

    device: torch.device
    dtype: torch.dtype
    reasons: tuple[str, ...] = ()

    @property
    def dtype_name(self) -> str:
        """The short name: bf16, fp16 or fp32."""
        full = str(self.dtype).removeprefix("torch.")
        return next((short for short, name in DTYPES.items() if name == full), full)


def choose(device: str = "auto", dtype: str = "auto") -> Placement:
    """Places the network.

    device: auto (a GPU where there is one), cpu, cuda or cuda:N; dtype: auto, bf16, fp16 or fp32.
    Raises OptionError for an unknown name, ResourceError for a device that is not there, and
    MissingDependencyError without torch.
    """
    check_names(device, dtype)
    torch = _torch()
    found, why_device = _device(device)
    if dtype != "auto":
        return Placement(found, getattr(torch, DTYPES[dtype]), (why_device, f"{dtype} was asked for"))
    short, why_dtype = _natural_dtype(found)
    return Placement(found, getattr(torch, DTYPES[short]), (why_device, why_dtype))


def use_threads(count: int) -> None:
    """So many threads on the CPU, for all of torch in this process. Raises MissingDependencyError without torch."""
    _torch().set_num_threads(count)


def spare_memory() -> None:
    """Lets torch's allocator on GPUs extend its blocks; else a part of a tight budget is lost between them.

    It counts if nothing lies on the GPU yet. What the environment says already is left as it is.
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def device_names() -> list[str]:
    """What `choose` accepts here: cpu, and every GPU with its name."""
    cuda = _torch().cuda
    gpus = [f"cuda:{index} ({cuda.get_device_name(index)})" for index in range(cuda.device_count())]
    return ["cpu", *gpus]


@dataclass(frozen=True, slots=True)
class Memory:
    """A device's memory in bytes."""

    device: str
    free: int
    total: int


def memory() -> list[Memory]:
    """Main memory where the system tells it, then every GPU that torch sees. Works without torch."""
    found = []
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        page = os.sysconf("SC_PAGE_SIZE")
        found.append(Memory("cpu", os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page))
    try:
        cuda = _torch().cuda
    except MissingDependencyError:
        return found
    names = enumerate(device_names()[1:])
    return found + [Memory(name, *cuda.mem_get_info(index)) for index, name in names]


def peak_memory(device: str = "cpu") -> tuple[int | None, int | None]:
    """Most bytes ever held by this process: in main memory (None on Windows) and on the GPU (None on a CPU)."""
    return _peak_host(), _torch().cuda.max_memory_allocated(device) if device.startswith("cuda") else None


def _peak_host() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_names(device: str, dtype: str) -> None:
    """Raises OptionError for a device or dtype that there is nowhere; asks no torch."""
    # Python and C refuse numbers of many digits, each in a way of its own.
    if device != "auto" and not re.fullmatch(r"cpu|cuda(:\d{1,4})?", device):
        raise OptionError(f"unknown device {device[:40]!r}: use auto, cpu, cuda or cuda:N")
    if dtype != "auto" and dtype not in DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")


def _device(name: str) -> tuple[torch.device, str]:
    torch = _torch()
    if name == "cpu":
        return torch.device("cpu"), "the CPU was asked for"
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu"), "no CUDA device is available to torch, so the CPU"
    index = int(name.partition(":")[2] or 0)
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise ResourceError(f"no device {name} here: there is {', '.join(device_names())}")
    why = "a CUDA device is available" if name == "auto" else f"{name} was asked for"
    return torch.device("cuda", index), f"{why}: {torch.cuda.get_device_name(index)}"


def _natural_dtype(device: torch.device) -> tuple[str, str]:
    if device.type == "cpu":
        return "fp32", "fp32 is the fastest precision of plain matrix products on a CPU"
    if _torch().cuda.get_device_capability(device) >= FIRST_BF16_CAPABILITY:
        return "bf16", "bf16 is the checkpoints' own precision and this GPU computes in it"
    return "fp16", "this GPU has no bf16: fp16, with the residual in fp32 because its sums overflow fp16"


def _torch() -> ModuleType:
    try:
        return import_module("torch")
    except ImportError as error:
        raise MissingDependencyError("torch is not installed: pip install 'quasr[cuda]'") from error
