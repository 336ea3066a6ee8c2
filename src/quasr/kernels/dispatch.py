"""One table: which implementation of each operation runs here, and why."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from quasr.errors import OptionError
from quasr.kernels import reference, reference_audio

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import torch
    from torch import Tensor

    from quasr.kernels.matrix import Heads, LayerNorm, Matrix, Norm
    from quasr.kernels.state import DecodeState, Places, Prompts

VARIABLE = "QUASR_KERNELS"
"""The environment variable: `auto`, the default; `triton`, without kernels in CUDA C++; `reference` for the plain ones.
What asks for Triton fails loudly where it cannot run."""


FIRST_CAPABILITY = (7, 5)
FIRST_BF16_CAPABILITY = (8, 0)
"""CUDA compute capabilities that the kernels are written for, and that bf16 and Triton's products on tensor cores
need."""


class Linear(Protocol):
    def __call__(self, x: Tensor, matrix: Matrix, norm: Norm | None = None) -> Tensor: ...


class PromptAttention(Protocol):
    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, prompts: Prompts, heads: Heads) -> Tensor: ...


class Attention(Protocol):
    def __call__(self, x: Tensor, keys: Tensor, values: Tensor, places: Places, heads: Heads) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations, as `quasr.kernels.reference` and `reference_audio` specify them. `name` says whose, `reason` why.

    `capturable`: whether steps made of them can be captured in a CUDA graph.
    """

    name: str
    reason: str
    capturable: bool
    linear: Linear
    add_linear: Callable[[Tensor, Matrix, Tensor], None]
    sums_apart: Callable[[Matrix, int], bool]
    gated_linear: Linear
    add_rms_norm: Callable[[Tensor, Tensor | None, Norm], Tensor]
    embed: Callable[[Tensor, Matrix], Tensor]
    rotate_write: Attention
    attend: Attention
    attend_step: Attention
    attend_prompts: PromptAttention
    choose: Callable[[Tensor, Norm, Matrix], tuple[Tensor, Tensor]]
    advance: Callable[[DecodeState, Tensor, Tensor], None]
    dequantise: Callable[[Matrix], Tensor]
    convolve_mel: Callable[[Tensor, Tensor, Tensor], Tensor]
    add_gelu: Callable[[Tensor, Tensor], Tensor]
    stem_features: Callable[[Tensor, Tensor], Tensor]
    add_norm: Callable[[Tensor, Tensor | None, LayerNorm], Tensor]
    attend_windows: Callable[[Tensor, Tensor, int, int], Tensor]

    def lines(self) -> list[str]:
        """One line for each operation: where it is implemented. `reason` says why."""
        return [f"{name}: {getattr(self, name).__module__}" for name in OPERATIONS]


OPERATIONS = (
    "linear",
    "add_linear",
    "sums_apart",
    "gated_linear",
    "add_rms_norm",
    "embed",
    "rotate_write",
    "attend",
    "attend_step",
    "attend_prompts",
    "choose",
    "advance",
    "dequantise",
    "convolve_mel",
    "add_gelu",
    "stem_features",
    "add_norm",
    "attend_windows",
)


def plain(reason: str) -> Kernels:
    """The reference for every operation."""
    return Kernels("reference", reason, False, **_table(reference, reference_audio))


def _table(*modules: ModuleType) -> dict[str, Callable[..., Any]]:
    """Of each operation, what the first module that has it calls so."""
    return {name: next(getattr(module, name) for module in modules if hasattr(module, name)) for name in OPERATIONS}


@cache
def choose(device: torch.device, dtype: torch.dtype) -> Kernels:
    """What runs on `device` with weights (or scales) of `dtype`; picked once for each.

    Raises OptionError where the environment variable QUASR_KERNELS is unknown, or asks for what cannot run.
    """
    wish = os.environ.get(VARIABLE, "auto")
    if wish not in ("auto", "reference", "triton"):
        raise OptionError(f"{VARIABLE} is {wish!r}: use auto, reference or triton")
    if wish == "reference":
        return plain(f"{VARIABLE}=reference asks for it")
    lack = _lack(device, dtype)
    if lack is None:
        return triton(device, dtype) if wish == "triton" else fastest(device, dtype)
    if wish == "triton":
        raise OptionError(f"{VARIABLE} is triton, but {lack}: use auto")
    return plain(lack)


def _lack(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run, or None."""
    import torch

    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, and this is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    least = FIRST_BF16_CAPABILITY if dtype == torch.bfloat16 else FIRST_CAPABILITY
    if capability < least:
        return f"Triton kernels in {dtype} need compute capability {least}, and this GPU has {capability}"
    return None if find_spec("triton") else "Triton is not installed"


def fastest(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Triton's kernels, but for one row those in CUDA C++ where they run."""
    from quasr.kernels import cuda_row

    kernels, lack = triton(device, dtype), cuda_row.lack(device, dtype)
    if lack is not None:
        return replace(kernels, reason=f"{kernels.reason}; one row by Triton too: for kernels in CUDA C++ {lack}")
    own = {name: getattr(cuda_row, name) for name in OPERATIONS if hasattr(cuda_row, name)}
    return replace(kernels, reason=f"{kernels.reason}; one row by kernels in CUDA C++", **own)


def triton(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The Triton kernels; on a CPU they need Triton's interpreter and serve tests alone.

    Prompts are attended by the reference, which is one call of torch for each, where there are no tensor cores for the
    numbers.
    """
    import torch

    from quasr.kernels import triton_attention, triton_audio, triton_linear, triton_prompt, triton_rows

    table = _table(triton_linear, triton_attention, triton_prompt, triton_rows, triton_audio)
    if device.type == "cuda" and (
        dtype == torch.float32 or torch.cuda.get_device_capability(device) < FIRST_BF16_CAPABILITY
    ):
        table["attend_prompts"] = reference.attend_prompts
    where = "Triton's interpreter" if device.type == "cpu" else f"Triton on {device}"
    return Kernels("triton", f"{where} in {dtype}", device.type == "cuda", **table)
