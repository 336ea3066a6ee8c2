"""Products with few rows: every weight is read once, in wide loads, and multiplied in fp32 outside the tensor cores.

A program computes `block_rows` outputs of all m rows. The weights do not depend on the kernel before, so with
programmatic dependent launch their loads start before it has ended. RMSNorm comes in as sum(w * x * g) / rms(x), which
needs one pass over x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from quasr.kernels.triton_launch import block, gdc_launch, gdc_wait

if TYPE_CHECKING:
    from quasr.kernels.matrix import Matrix

PLAIN, ADD, GATE, HEAD = 0, 1, 2, 3
"""What happens to the sums: stored; added to the residual; silu(first half) * second half; reduced for the argmax."""
DEEP = 4
"""For plans: ADD, where W has more columns than rows."""


@dataclass(frozen=True, slots=True)
class Plan:
    """block_rows outputs a program; block_columns a step; warps a program."""

    block_rows: int
    block_columns: int
    warps: int


@triton.jit
def tile(weight, rows, k0, n, k, BITS: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr):
    """Codes at column k0 as stored: (rows, BK), or (rows, BK / GROUP, GROUP / PER) where scales are grouped."""
    PER: tl.constexpr = 2 if BITS == 4 else 1
    if GROUP == 0:
        columns = k0 // PER + tl.arange(0, BK // PER)
        places = rows.to(tl.int64)[:, None] * (k // PER) + columns[None, :]
        inside = (rows < n)[:, None] & (columns < k // PER)[None, :]
    else:
        starts = k0 + tl.arange(0, BK // GROUP) * GROUP
        columns = starts[:, None] // PER + tl.arange(0, GROUP // PER)[None, :]
        places = rows.to(tl.int64)[:, None, None] * (k // PER) + columns[None, :, :]
        inside = (rows < n)[:, None, None] & (columns < k // PER)[None, :, :]
    if EVEN:
        return tl.load(weight + places, eviction_policy="evict_first")
    else:
        return tl.load(weight + places, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def factors(scale, rows, k0, n, k, BK: tl.constexpr, GROUP: tl.constexpr):
    """The scales of a chunk: (rows, BK / GROUP) fp32, or nothing of use where a row has one scale."""
    if GROUP == 0:
        return 1.0
    else:
        groups = k0 // GROUP + tl.arange(0, BK // GROUP)
        inside = (rows < n)[:, None] & (groups < k // GROUP)[None, :]
        places = rows.to(tl.int64)[:, None] * (k // GROUP) + groups[None, :]
        return tl.load(scale + places, mask=inside, other=0).to(tl.float32)


@triton.jit
def activations(x, norm, k0, k, BK: tl.constexpr, NORM: tl.constexpr):
    """One row of x, a chunk of it (BK,) in fp32: as it is, and times the norm's weight where there is one."""
    columns = k0 + tl.arange(0, BK)
    plain = tl.load(x + columns, mask=columns < k, other=0).to(tl.float32)
    if NORM:
        normed = plain * tl.load(norm + columns, mask=columns < k, other=0).to(tl.float32)
    else:
        normed = plain
    return plain, normed


@triton.jit
def number(code, OFFSET: tl.constexpr):
    """int32 code from 0 to 255 -> code - OFFSET in fp32, by way of 2^23 + code: conversions of integers are slow."""
    return (code ^ 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)


@triton.jit
def terms(codes, scaled, x, BITS: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """What has to be summed over the columns for x W^T: (rows, BK), or (rows, BK / GROUP) where scales are grouped."""
    if BITS == 4:
        low, high = tl.split(tl.reshape(x, (BK // GROUP, GROUP // 2, 2)))
        pairs = codes.to(tl.int32)
        found = number(pairs & 15, 8.0) * low[None] + number(pairs >> 4, 8.0) * high[None]
        return tl.sum(found, axis=2) * scaled
    else:
        if BITS == 8:
            numbers = number(codes.to(tl.uint8, bitcast=True).to(tl.int32) ^ 128, 128.0)
        else:
            numbers = codes.to(tl.float32)
        if GROUP:
            return tl.sum(numbers * tl.reshape(x, (BK // GROUP, GROUP))[None], axis=2) * scaled
        else:
            return numbers * x[None, :]


@triton.jit
def reduce_head(logits, rows, n, best, places, totals, where, inside):
    """Of a block of logits: the largest, its row and sum(exp(logit - largest)). NaN makes the sum NaN."""
    kept = tl.where(rows < n, logits, float("-inf"))
    largest = tl.max(kept, axis=0)
    place = tl.min(tl.where(kept == largest, rows, n - 1), axis=0)
    tl.store(best + where, largest, mask=inside)
    tl.store(places + where, place, mask=inside)
    tl.store(totals + where, tl.sum(tl.exp(kept - largest), axis=0), mask=inside)


@triton.jit
def matvec(
    x, weight, scale, norm, out, places, totals, m, n, k, eps,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, NORM: tl.constexpr, MODE: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (m, n) = norm(x) W^T. With GATE n counts the outputs: W has 2 n rows. All of W that is needed comes first."""
    FOUND: tl.constexpr = 2 * BN if MODE == 2 else BN
    rows = tl.program_id(0) * BN + tl.arange(0, FOUND) % BN
    limit = n
    if MODE == 2:
        # Gate and up alternate: a row of the first half of W, the same row of the second.
        pair = tl.arange(0, FOUND)
        rows = tl.program_id(0) * BN + pair // 2
        rows = tl.where(rows < n, rows + (pair % 2) * n, 2 * n)
        limit = 2 * n
    if PDL:
        gdc_launch()
    codes0 = tile(weight, rows, 0, limit, k, BITS, BK, GROUP, EVEN)
    scaled0 = factors(scale, rows, 0, limit, k, BK, GROUP)
    if CHUNKS > 1:
        codes1 = tile(weight, rows, BK, limit, k, BITS, BK, GROUP, EVEN)
        scaled1 = factors(scale, rows, BK, limit, k, BK, GROUP)
    if CHUNKS > 2:
        codes2 = tile(weight, rows, 2 * BK, limit, k, BITS, BK, GROUP, EVEN)
        scaled2 = factors(scale, rows, 2 * BK, limit, k, BK, GROUP)
    if SCALED:
        whole = tl.load(scale + rows, mask=rows < limit, other=0).to(tl.float32)
    if PDL:
        gdc_wait()
    for line in tl.static_range(M):
        # Lines beyond m compute the last one again, and store nothing.
        row = x + tl.minimum(line, m - 1) * k
        plain, y = activations(row, norm, 0, k, BK, NORM)
        sums = terms(codes0, scaled0, y, BITS, BK, GROUP)
        squares = plain * plain
        if CHUNKS > 1:
            plain, y = activations(row, norm, BK, k, BK, NORM)
            sums += terms(codes1, scaled1, y, BITS, BK, GROUP)
            squares += plain * plain
        if CHUNKS > 2:
            plain, y = activations(row, norm, 2 * BK, k, BK, NORM)
            sums += terms(codes2, scaled2, y, BITS, BK, GROUP)
            squares += plain * plain
        result = tl.sum(sums, axis=1)
        if SCALED:
            result *= whole
        if NORM:
            result *= tl.rsqrt(tl.sum(squares, axis=0) / k + eps)
        finish(result, rows, out, places, totals, line, m, n, MODE, BN)


@triton.jit
def finish(result, rows, out, places, totals, line, m, n, MODE: tl.constexpr, BN: tl.constexpr):
    """Stores one line of results (BN,), or of BN pairs."""
    if MODE == 3:
        reduce_head(result, rows, n, out, places, totals, line * tl.num_programs(0) + tl.program_id(0), line < m)
    elif MODE == 2:
        gate, up = tl.split(tl.reshape(result, (BN, 2)))
        rows = tl.program_id(0) * BN + tl.arange(0, BN)
        gated = gate * tl.sigmoid(gate) * up
        tl.store(out + line * n + rows, gated.to(out.dtype.element_ty), mask=(rows < n) & (line < m))
    else:
        inside = (rows < n) & (line < m)
        if MODE == 1:
            result += tl.load(out + line * n + rows, mask=inside, other=0)
        tl.store(out + line * n + rows, result.to(out.dtype.element_ty), mask=inside)


MOST_CHUNKS = 3
MOST_COLUMNS = {16: 1024, 8: 2048, 4: 2048}
"""Columns that a program takes at a time, by the bits of a weight: 16 bytes a thread, or 8 for 4 bits, of 128."""


CUTS = {
    8: {PLAIN: (4, 2), ADD: (4, 2), GATE: (8, 4), HEAD: (16, 4), DEEP: (8, 4)},
    4: {PLAIN: (8, 4), ADD: (8, 4), GATE: (4, 4), HEAD: (8, 4), DEEP: (8, 8)},
    16: {PLAIN: (8, 2), ADD: (4, 2), GATE: (2, 4), HEAD: (4, 4), DEEP: (1, 4)},
    32: {PLAIN: (2, 4), ADD: (2, 4), GATE: (1, 4), HEAD: (2, 4), DEEP: (1, 4)},
}
"""Outputs and warps of a program, by the bits of a weight; the fastest on an H200 but for 32, which only has to fit."""


def fits(matrix: Matrix) -> bool:
    """Whether a program can hold whole rows, and whole groups of them, which have to be powers of two."""
    group, columns = group_of(matrix), block_columns(matrix)
    return columns * MOST_CHUNKS >= matrix.columns and (group == 0 or (group & (group - 1) == 0 and group <= columns))


def group_of(matrix: Matrix) -> int:
    """Columns that are summed before they are scaled; 0 where whole rows are, which 4 bits never are."""
    return 0 if matrix.group == matrix.columns and matrix.bits != 4 else matrix.group


def block_columns(matrix: Matrix) -> int:
    """The largest power of two that divides the columns, within reason; else one that needs a mask."""
    k = matrix.columns
    most = MOST_COLUMNS[matrix.bits]
    even = min(k & -k, most)
    return even if even * MOST_CHUNKS >= k else block(triton.cdiv(k, MOST_CHUNKS), 16, 2 * most)


def plan(matrix: Matrix, mode: int) -> Plan:
    """How a product is cut into programs."""
    bits = 32 if matrix.weight.dtype == torch.float32 else matrix.bits
    rows, warps = CUTS[bits][DEEP if mode == ADD and matrix.columns > matrix.rows else mode]
    return Plan(rows, block_columns(matrix), warps)
