"""LLM.int8 and NF4 through bitsandbytes, as recipes that people know; on a CPU and on CUDA.

Its operations are called rather than its modules: those quantise when they are moved to a device, and log a line for
every matrix product in bf16.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from quasr.errors import MissingDependencyError, OptionError
from quasr.quant.linear import bias_of
from quasr.quant.scheme import NF4_GROUP

if TYPE_CHECKING:
    from quasr.quant.scheme import Scheme

ROW_MAJOR = 0
"""The only value of `weight_format` that bitsandbytes writes today."""


class LLMInt8Linear(nn.Module):
    """LLM.int8 (Dettmers et al. 2022): int8 weights and int8 activations, large columns of activations in 16 bits.

    weight: int8 (out, in); SCB: fp32 (out,), each row's largest |w|, so that w = weight * SCB / 127.
    The names are those that bitsandbytes and transformers write. `threshold` 0 keeps no column in 16 bits.
    """

    weight: Tensor
    SCB: Tensor
    weight_format: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, row_absmax: Tensor, bias: Tensor | None, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("SCB", row_absmax)
        self.register_buffer("weight_format", torch.tensor(ROW_MAJOR, dtype=torch.uint8, device=weight.device))

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme) -> Self:
        """Raises MissingDependencyError without bitsandbytes."""
        weight = linear.weight.detach()
        codes, row_absmax, _ = _library().functional.int8_vectorwise_quant(weight.to(torch.float16))
        return cls(codes, row_absmax, bias_of(linear), scheme.threshold)

    @classmethod
    def shaped_like(cls, linear: nn.Linear, scheme: Scheme) -> Self:
        """With tensors on the meta device, to be filled from a file. Raises MissingDependencyError."""
        _library()
        weight = torch.empty(linear.weight.shape, dtype=torch.int8, device="meta")
        return cls(weight, torch.empty(len(weight), device="meta"), bias_of(linear), scheme.threshold)

    def dequantize(self) -> Tensor:
        """(out, in) in fp32."""
        return self.weight.float() * (self.SCB / 127)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        codes, absmax, outliers = _library().functional.int8_vectorwise_quant(rows.to(torch.float16), self.threshold)
        if self.threshold:
            y, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
                rows, codes, self.weight, absmax, self.SCB, outliers, self.bias
            )
        else:
            y = torch.ops.bitsandbytes.int8_scaled_mm(
                codes, self.weight, absmax, self.SCB, bias=self.bias, dtype=x.dtype
            )
        return y.view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"in={self.weight.shape[1]}, out={self.weight.shape[0]}, threshold={self.threshold}"


class NF4Linear(nn.Module):
    """NF4 (Dettmers et al. 2023): 4-bit indices into sixteen quantiles of the normal distribution.

    weight: uint8 (out, in / 2); absmax: fp32 (out, in / 64), the largest |w| of each block.
    """

    weight: Tensor
    absmax: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, absmax: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("absmax", absmax)
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme) -> Self:
        """Raises OptionError where blocks of 64 do not divide the input features, MissingDependencyError."""
        rows, columns = linear.weight.shape
        if not scheme.fits(columns):
            raise OptionError(f"{columns} input features do not divide into NF4's blocks of {NF4_GROUP}: use int8")
        packed, state = _library().functional.quantize_4bit(
            linear.weight.detach(), blocksize=NF4_GROUP, quant_type="nf4"
        )
        return cls(packed.view(rows, -1), state.absmax.view(rows, -1), bias_of(linear))

    @classmethod
    def shaped_like(cls, linear: nn.Linear, scheme: Scheme) -> Self:
        """With tensors on the meta device, to be filled from a file. Raises MissingDependencyError."""
        _library()
        rows, columns = linear.weight.shape
        weight = torch.empty(rows, columns // 2, dtype=torch.uint8, device="meta")
        return cls(weight, torch.empty(rows, columns // scheme.group, device="meta"), bias_of(linear))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in)."""
        return _library().functional.dequantize_4bit(self.weight.view(-1, 1), self._state(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        packed = self.weight.view(-1, 1).t()
        return _library().matmul_4bit(x, packed, quant_state=self._state(x.dtype), bias=self.bias)

    def _state(self, dtype: torch.dtype) -> Any:
        return _library().functional.QuantState(
            absmax=self.absmax.view(-1),
            shape=torch.Size((self.weight.shape[0], self.weight.shape[1] * 2)),
            code=_quantiles(self.weight.device),
            blocksize=NF4_GROUP,
            quant_type="nf4",
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        return f"in={self.weight.shape[1] * 2}, out={self.weight.shape[0]}"


@cache
def _quantiles(device: torch.device) -> Tensor:
    table: Tensor = _library().functional.get_4bit_type("nf4", device=device)
    return table


@cache
def _library() -> Any:
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise MissingDependencyError("bitsandbytes is not installed: pip install 'quasr[quant]'") from error
