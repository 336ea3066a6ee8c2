"""The weights that kernels read, without modules around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

BITS = {torch.int8: 8, torch.uint8: 4}
"""Dtypes of codes; everything else is the number itself."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """(rows, columns) weights of a product x W^T: w[r, c] = code[r, c] * scale[r, c // group].

    weight: floats (rows, columns) without a scale; int8 (rows, columns); or uint8 (rows, columns / 2) with code + 8 in
    each nibble, the even column in the low one. scale: (rows, columns / group), perhaps negative.
    """

    weight: Tensor
    scale: Tensor | None = None

    @property
    def bits(self) -> int:
        """8 or 4 for codes; 16 for floats, fp32 too."""
        return BITS.get(self.weight.dtype, 16)

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        return self.weight.shape[1] * (2 if self.bits == 4 else 1)

    @property
    def group(self) -> int:
        """Neighbouring columns that share a scale."""
        return self.columns // (1 if self.scale is None else self.scale.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in and what products are returned in."""
        return self.weight.dtype if self.scale is None else self.scale.dtype

    @property
    def bytes(self) -> int:
        """Memory of the weights and their scales."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm: weight (size,)."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """A LayerNorm of the audio encoder: weight and bias (size,)."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Heads:
    """Grouped-query attention: `count` query heads share `kv_count` key heads of `size` numbers.

    rates: (size / 2,) fp32, the angle by which RoPE turns each pair of numbers from one position to the next.
    """

    count: int
    kv_count: int
    size: int
    q_norm: Norm
    k_norm: Norm
    rates: Tensor

    @property
    def query_width(self) -> int:
        return self.count * self.size

    @property
    def width(self) -> int:
        """Columns of q, k and v side by side."""
        return (self.count + 2 * self.kv_count) * self.size
