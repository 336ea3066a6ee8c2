"""One int8 tensor that is the embedding and, where the two are tied, the head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quasr.quant.linear import fill_rows, quantise_int8, row_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable

HEAD_NUMBERS = 1 << 25
"""Weights that the head dequantises at once: 64 MB in 16 bits, where the whole vocabulary would take 622."""


class Int8Embedding(nn.Module):
    """weight: int8 (vocab, hidden); scale: (vocab, 1) in the network's dtype. Both are buffers."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> Self:
        """Rounds to nearest, one scale a row."""
        return cls.from_blocks(embedding, row_blocks(embedding.weight), embedding.weight.device)

    @classmethod
    def from_blocks(cls, embedding: nn.Embedding, blocks: Iterable[Tensor], device: torch.device) -> Self:
        """As `from_embedding`, of a weight that comes in blocks of rows on `device`. `embedding` tells its shape."""
        weight = embedding.weight
        codes = torch.empty(weight.shape, dtype=torch.int8, device=device)
        scale = torch.empty(len(weight), 1, dtype=weight.dtype, device=device)
        fill_rows(codes, scale, blocks, quantise_int8)
        return cls(codes, scale)

    @classmethod
    def shaped_like(cls, embedding: nn.Embedding) -> Self:
        """With tensors on the meta device, to be filled from a file."""
        weight = embedding.weight
        scale = torch.empty(weight.shape[0], 1, dtype=weight.dtype, device="meta")
        return cls(torch.empty(weight.shape, dtype=torch.int8, device="meta"), scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) token ids -> (..., hidden) in the scale's dtype."""
        return self.weight[tokens].to(self.scale.dtype) * self.scale[tokens]

    def logits(self, x: Tensor) -> Tensor:
        """The tied head: (..., hidden) -> (..., vocab), some rows of the vocabulary at a time."""
        step = max(1, HEAD_NUMBERS // self.weight.shape[1])
        parts = [
            F.linear(x, codes.to(scale.dtype) * scale)
            for codes, scale in zip(self.weight.split(step), self.scale.split(step), strict=True)
        ]
        return torch.cat(parts, dim=-1)

    def dequantize(self) -> Tensor:
        """(vocab, hidden) in the scale's dtype."""
        return self.weight.to(self.scale.dtype) * self.scale

    def extra_repr(self) -> str:
        return f"vocab={self.weight.shape[0]}, hidden={self.weight.shape[1]}"
