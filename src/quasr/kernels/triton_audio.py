"""The audio encoder's kernels. Each reads and writes its tensors once; between them stand products of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from quasr.kernels.triton_attention import LEAST_DOT, LOG2_E
from quasr.kernels.triton_launch import block, wide_fits

if TYPE_CHECKING:
    from torch import Tensor

    from quasr.kernels.matrix import LayerNorm

MOST_TOKENS, FEWER_TOKENS = 128, 64
"""Of a window, that a program holds at once, and where so many do not fit: a full one of the released models has 104.
"""


@triton.jit
def gelu(x):
    """x * P(X <= x) for a standard normal X."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def convolution(chunks, weight, bias, out, bins, frames, high, wide, channels, by_chunk, by_bin, by_frame,
                BP: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """BP places of one chunk: a product of their nine neighbours (of 16 lanes) and the weights."""
    chunk = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BP + tl.arange(0, BP)
    taps = tl.arange(0, 16)
    rows = (places // wide * 2 - 1)[:, None] + (taps // 3)[None, :]
    columns = (places % wide * 2 - 1)[:, None] + (taps % 3)[None, :]
    known = (rows >= 0) & (rows < bins) & (columns >= 0) & (columns < frames) & (taps < 9)[None, :]
    x = tl.load(chunks + chunk * by_chunk + rows * by_bin + columns * by_frame, mask=known, other=0)
    x = x.to(weight.dtype.element_ty)
    for first in range(0, channels, BC):
        c = first + tl.arange(0, BC)
        w = tl.load(
            weight + c[None, :] * 9 + taps[:, None], mask=(taps < 9)[:, None] & (c < channels)[None, :], other=0
        )
        y = tl.dot(x, w, input_precision=PRECISION)
        y = gelu(y + tl.load(bias + c, mask=c < channels, other=0).to(tl.float32)[None, :])
        where = (chunk * high * wide + places)[:, None] * channels + c[None, :]
        inside = (places < high * wide)[:, None] & (c < channels)[None, :]
        tl.store(out + where, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def activation(x, bias, m, k, BM: tl.constexpr, BK: tl.constexpr):
    """x (m, k) = gelu(x + bias), in place."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    inside = (rows < m) & (columns < k)
    y = tl.load(x + rows * k + columns, mask=inside, other=0).to(tl.float32)
    y = gelu(y + tl.load(bias + columns, mask=columns < k, other=0).to(tl.float32))
    tl.store(x + rows * k + columns, y.to(x.dtype.element_ty), mask=inside)


@triton.jit
def features(x, bias, out, high, wide, channels, HP: tl.constexpr, BC: tl.constexpr):
    """One column (high, channels) of a chunk, to (channels, high)."""
    column = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HP)[:, None]
    c = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    inside = (h < high) & (c < channels)
    start = column // wide * high * wide + column % wide
    y = tl.load(x + (start + h * wide) * channels + c, mask=inside, other=0).to(tl.float32)
    y = gelu(y + tl.load(bias + c, mask=c < channels, other=0).to(tl.float32))
    where = column * high * channels + tl.trans(c) * high + tl.trans(h)
    tl.store(out + where, tl.trans(y).to(out.dtype.element_ty), mask=tl.trans(inside))


@triton.jit
def normalisation(x, y, weight, bias, out, k, eps, ADD: tl.constexpr, BK: tl.constexpr):
    """One row: x += y, then LayerNorm."""
    row = tl.program_id(0).to(tl.int64) * k
    columns = tl.arange(0, BK)
    inside = columns < k
    found = tl.load(x + row + columns, mask=inside, other=0)
    if ADD:
        found = (found.to(tl.float32) + tl.load(y + row + columns, mask=inside, other=0)).to(found.dtype)
        tl.store(x + row + columns, found, mask=inside)
    wide = found.to(tl.float32)
    centred = tl.where(inside, wide - tl.sum(wide, axis=0) / k, 0.0)
    centred *= tl.rsqrt(tl.sum(centred * centred, axis=0) / k + eps)
    scaled = centred * tl.load(weight + columns, mask=inside, other=0) + tl.load(bias + columns, mask=inside, other=0)
    tl.store(out + row + columns, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def tile(x, rows, columns, m, k, stride):
    """Rows and columns (rows, columns) of x, zeros outside of m and k."""
    inside = (rows < m)[:, None] & (columns < k)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0)


@triton.jit
def attention(qkv, starts, out, scale, HEADS: tl.constexpr, SIZE: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """BM queries of one head in one window, over its keys, BM at a time."""
    begin, end = tl.load(starts + tl.program_id(0)), tl.load(starts + tl.program_id(0) + 1)
    rows = begin + tl.program_id(2) * BM + tl.arange(0, BM)
    if begin + tl.program_id(2) * BM < end:
        WIDTH: tl.constexpr = HEADS * SIZE
        d = tl.arange(0, DP)
        own = qkv + tl.program_id(1) * SIZE
        q = tile(own, rows, d, end, SIZE, 3 * WIDTH)
        largest = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        sums = tl.zeros((BM, DP), tl.float32)
        for at in range(begin, end, BM):
            p = at + tl.arange(0, BM)
            k = tile(own + WIDTH, p, d, end, SIZE, 3 * WIDTH)
            v = tile(own + 2 * WIDTH, p, d, end, SIZE, 3 * WIDTH)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            scores = tl.where((p < end)[None, :], scores, float("-inf"))
            raised = tl.maximum(largest, tl.max(scores, axis=1))
            shares = tl.exp2(scores - raised[:, None])
            keep = tl.exp2(largest - raised)
            total = total * keep + tl.sum(shares, axis=1)
            sums = sums * keep[:, None] + tl.dot(shares.to(v.dtype), v, input_precision=PRECISION)
            largest = raised
        where = out + rows.to(tl.int64)[:, None] * WIDTH + tl.program_id(1) * SIZE + d[None, :]
        inside = (rows < end)[:, None] & (d < SIZE)[None, :]
        tl.store(where, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)


def convolve_mel(chunks: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `reference_audio.convolve_mel`."""
    count, bins, frames = chunks.shape
    high, wide, channels = (bins + 1) // 2, (frames + 1) // 2, len(weight)
    out = torch.empty(count, high, wide, channels, dtype=weight.dtype, device=chunks.device)
    places = block(high * wide, LEAST_DOT, 64)
    convolution[count, triton.cdiv(high * wide, places)](
        chunks, weight, bias, out, bins, frames, high, wide, channels, *chunks.stride(),
        BP=places, BC=block(channels, LEAST_DOT, 64), PRECISION=_precision(weight), num_warps=4,
    )  # fmt: skip
    return out


def add_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """See `reference_audio.add_gelu`. x is overwritten."""
    k = len(bias)
    m, width = x.numel() // k, block(k, most=1024)
    rows = max(1, 4096 // width)
    activation[triton.cdiv(m, rows), triton.cdiv(k, width)](x, bias, m, k, BM=rows, BK=width, num_warps=4)
    return x


def stem_features(x: Tensor, bias: Tensor) -> Tensor:
    """See `reference_audio.stem_features`."""
    count, high, wide, channels = x.shape
    out = torch.empty(count, wide, channels * high, dtype=x.dtype, device=x.device)
    width = block(channels, most=128)
    features[count * wide, triton.cdiv(channels, width)](
        x, bias, out, high, wide, channels, HP=block(high), BC=width, num_warps=4
    )
    return out


def add_norm(x: Tensor, y: Tensor | None, norm: LayerNorm) -> Tensor:
    """See `reference_audio.add_norm`."""
    out = torch.empty(x.shape, dtype=norm.weight.dtype, device=x.device)
    normalisation[len(x),](
        x, x if y is None else y, norm.weight, norm.bias, out, x.shape[1], norm.eps,
        ADD=y is not None, BK=block(x.shape[1]), num_warps=4,
    )  # fmt: skip
    return out


def attend_windows(qkv: Tensor, starts: Tensor, heads: int, longest: int) -> Tensor:
    """See `reference_audio.attend_windows`."""
    width = qkv.shape[1] // 3
    size, tokens = width // heads, block(longest, LEAST_DOT, MOST_TOKENS if wide_fits(qkv) else FEWER_TOKENS)
    out = torch.empty(len(qkv), width, dtype=qkv.dtype, device=qkv.device)
    attention[len(starts) - 1, heads, triton.cdiv(longest, tokens)](
        qkv, starts, out, size**-0.5 * LOG2_E,
        HEADS=heads, SIZE=size, DP=block(size, LEAST_DOT), BM=tokens, PRECISION=_precision(qkv),
        num_warps=8 if tokens == MOST_TOKENS else 4, num_stages=1,
    )  # fmt: skip
    return out


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"
