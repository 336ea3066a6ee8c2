"""The audio encoder's operations in plain torch: the rest of the specification in `quasr.kernels.reference`.

Convolutions of the stem have their channels last: (chunks, high, wide, channels). Tokens of all clips lie packed, one
after the other; windows are given by where they start.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from quasr.kernels.matrix import LayerNorm


def convolve_mel(chunks: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(chunks, bins, frames) -> (chunks, bins / 2, frames / 2, channels) in the weight's dtype, both rounded up.

    gelu of a 3x3 convolution of stride 2 and padding 1. weight: (channels, 1, 3, 3).
    """
    y = F.gelu(F.conv2d(chunks[:, None].to(weight.dtype), weight, bias, stride=2, padding=1))
    return y.permute(0, 2, 3, 1).contiguous()


def add_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """(..., k) + bias (k,) -> its exact gelu (Hendrycks and Gimpel 2016). May overwrite x, which is contiguous."""
    return F.gelu(x + bias)


def stem_features(x: Tensor, bias: Tensor) -> Tensor:
    """(chunks, high, wide, channels) -> (chunks, wide, channels * high): gelu(x + bias), each column flattened."""
    return F.gelu(x + bias).permute(0, 2, 3, 1).flatten(2)


def add_norm(x: Tensor, y: Tensor | None, norm: LayerNorm) -> Tensor:
    """x (m, k) += y (m, k), in place, where there is a y; LayerNorm of it, in the norm's dtype (Ba et al. 2016)."""
    if y is not None:
        x += y
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return F.layer_norm(x, x.shape[1:], weight, bias, norm.eps).to(norm.weight.dtype)


def attend_windows(qkv: Tensor, starts: Tensor, heads: int, longest: int) -> Tensor:
    """(tokens, 3 * width) -> (tokens, width): bidirectional attention inside each window.

    starts: (windows + 1,) int32, where window i begins and i + 1 ends, at most `longest` tokens later; windows may be
    empty. Tokens before the first or behind the last get numbers without a meaning. Reads `starts` on the host.
    """
    out = torch.zeros_like(qkv[:, : qkv.shape[1] // 3])
    split = qkv.unflatten(1, (3, heads, -1))
    for begin, end in pairwise(starts.tolist()):
        if end > begin:
            q, k, v = split[begin:end].permute(1, 2, 0, 3)
            out[begin:end] = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
    return out
