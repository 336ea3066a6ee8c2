"""Products with many rows, on the tensor cores: codes are turned into 16-bit numbers in the tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from quasr.kernels.triton_launch import gdc_launch, gdc_wait

if TYPE_CHECKING:
    from quasr.kernels.matrix import Matrix


@dataclass(frozen=True, slots=True)
class ProductPlan:
    """A tile: `lines` of x by `rows` of W, `columns` a step; warps and pipeline stages of a program."""

    lines: int
    rows: int
    columns: int
    warps: int
    stages: int


@triton.jit
def weights(weight, scale, rows, k0, n, k, BITS: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr,
            TYPE: tl.constexpr):  # fmt: skip
    """(rows, BK) of W at column k0 in TYPE; times its scales where they are grouped."""
    PER: tl.constexpr = 2 if BITS == 4 else 1
    columns = k0 // PER + tl.arange(0, BK // PER)
    inside = (rows < n)[:, None] & (columns < k // PER)[None, :]
    codes = tl.load(weight + rows.to(tl.int64)[:, None] * (k // PER) + columns[None, :], mask=inside, other=0)
    if BITS == 4:
        low, high = (codes & 15).to(tl.int8) - 8, (codes >> 4).to(tl.int8) - 8
        found = tl.interleave(low, high).to(TYPE)
    else:
        found = codes.to(TYPE)
    if GROUP:
        columns = k0 + tl.arange(0, BK)
        places = rows.to(tl.int64)[:, None] * (k // GROUP) + (columns // GROUP)[None, :]
        found *= tl.load(scale + places, mask=(rows < n)[:, None] & (columns < k)[None, :], other=0).to(TYPE)
    return found


@triton.jit
def multiply(x, w, sums, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """sums + x W^T, (BM, BN); with SWAP sums + W x^T, (BN, BM)."""
    if SWAP:
        return tl.dot(w, tl.trans(x), sums, input_precision=PRECISION)
    else:
        return tl.dot(x, tl.trans(w), sums, input_precision=PRECISION)


@triton.jit
def product(
    x, weight, scale, out, places, totals, m, n, k,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, MODE: tl.constexpr, SWAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out (m, n) = x W^T, with the MODEs of `triton_matvec.matvec`. With GATE W has 2 n rows."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    lines = tl.program_id(1) * BM + tl.arange(0, BM)
    if PDL:
        gdc_wait()
        gdc_launch()
    shape: tl.constexpr = (BN, BM) if SWAP else (BM, BN)
    sums = tl.zeros(shape, tl.float32)
    if MODE == 2:
        more = tl.zeros(shape, tl.float32)
    for k0 in range(0, k, BK):
        columns = k0 + tl.arange(0, BK)
        inside = (lines < m)[:, None] & (columns < k)[None, :]
        y = tl.load(x + lines.to(tl.int64)[:, None] * k + columns[None, :], mask=inside, other=0).to(TYPE)
        sums = multiply(y, weights(weight, scale, rows, k0, n, k, BITS, GROUP, BK, TYPE), sums, SWAP, PRECISION)
        if MODE == 2:
            w = weights(weight, scale, tl.where(rows < n, rows + n, 2 * n), k0, 2 * n, k, BITS, GROUP, BK, TYPE)
            more = multiply(y, w, more, SWAP, PRECISION)
    if SWAP:
        sums = tl.trans(sums)
    if SCALED:
        sums *= tl.load(scale + rows, mask=rows < n, other=0).to(tl.float32)[None, :]
    inside = (lines < m)[:, None] & (rows < n)[None, :]
    where = lines.to(tl.int64)[:, None] * n + rows[None, :]
    if MODE == 3:
        target = lines * tl.num_programs(0) + tl.program_id(0)
        kept = tl.where((rows < n)[None, :], sums, float("-inf"))
        largest = tl.max(kept, axis=1)
        place = tl.min(tl.where(kept == largest[:, None], rows[None, :], n - 1), axis=1)
        tl.store(out + target, largest, mask=lines < m)
        tl.store(places + target, place, mask=lines < m)
        tl.store(totals + target, tl.sum(tl.exp(kept - largest[:, None]), axis=1), mask=lines < m)
    else:
        if MODE == 2:
            if SWAP:
                more = tl.trans(more)
            if SCALED:
                more *= tl.load(scale + n + rows, mask=rows < n, other=0).to(tl.float32)[None, :]
            sums = sums * tl.sigmoid(sums) * more
        if MODE == 1:
            sums += tl.load(out + where, mask=inside, other=0)
        tl.store(out + where, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dequantisation(weight, scale, out, n, k, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
                   BK: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """out (n, k) = code * scale."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    k0 = tl.program_id(1) * BK
    found = weights(weight, scale, rows, k0, n, k, BITS, GROUP, BK, TYPE)
    columns = k0 + tl.arange(0, BK)
    inside = (rows < n)[:, None] & (columns < k)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * k + columns[None, :], found, mask=inside)


def plan(matrix: Matrix, m: int, *, gate: bool) -> ProductPlan:
    """Narrow tiles where few rows of W would leave multiprocessors idle."""
    if m <= 32:
        rows = 16 if matrix.rows <= 8192 else 64
        return ProductPlan(16 if m <= 16 else 32, rows, 128, 4, 4)
    lines = 64 if m <= 64 else 128
    return ProductPlan(lines, 64 if gate or matrix.rows <= 8192 else 128, 64, 4 if lines == 64 else 8, 3)
