"""Products of several rows on the tensor cores: codes are turned into 16-bit numbers in the tile.

A program computes `rows` of W by `lines` of x, over all columns or over one of several parts of them. The last part of
a tile to end adds the parts, always in the same order, so that a result never depends on timing. Columns are counted in
units of storage: two of them are one where a byte holds two codes, and x is then read in pairs of numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from quasr.kernels.triton_launch import block, gdc_launch, gdc_wait, settled

if TYPE_CHECKING:
    from quasr.kernels.matrix import Matrix

BYTES_TO_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 ab, cd, x, y, minus;
    mov.b32 minus, 0xbf80bf80;
    prmt.b32 ab, $2, 0x43434343, 0x4140;
    prmt.b32 cd, $2, 0x43434343, 0x4342;
    and.b32 x, ab, 0xff7fff7f;
    and.b32 y, ab, 0xff80ff80;
    fma.rn.bf16x2 $0, y, minus, x;
    and.b32 x, cd, 0xff7fff7f;
    and.b32 y, cd, 0xff80ff80;
    fma.rn.bf16x2 $1, y, minus, x;
}""")
"""int8 c: 0x43 before its low 7 bits is 128 + them; before its sign bit 128 or 256: the difference is c, exactly."""
BYTES_TO_FP16: tl.constexpr = tl.constexpr("""{
    .reg .b32 x, ab, cd, offset;
    mov.b32 offset, 0x64806480;
    xor.b32 x, $2, 0x80808080;
    prmt.b32 ab, x, 0x64646464, 0x4140;
    prmt.b32 cd, x, 0x64646464, 0x4342;
    sub.rn.f16x2 $0, ab, offset;
    sub.rn.f16x2 $1, cd, offset;
}""")
"""int8 c: 0x64 before c + 128 is 1024 + 128 + c."""
NIBBLES_TO_BF16: tl.constexpr = tl.constexpr("""{
    .reg .b32 low, high, x, one, offset;
    mov.b32 one, 0x3f803f80;
    mov.b32 offset, 0xc308c308;
    and.b32 low, $4, 0x0f0f0f0f;
    shr.b32 high, $4, 4;
    and.b32 high, high, 0x0f0f0f0f;
    prmt.b32 x, low, 0x43434343, 0x4140;
    fma.rn.bf16x2 $0, x, one, offset;
    prmt.b32 x, low, 0x43434343, 0x4342;
    fma.rn.bf16x2 $1, x, one, offset;
    prmt.b32 x, high, 0x43434343, 0x4140;
    fma.rn.bf16x2 $2, x, one, offset;
    prmt.b32 x, high, 0x43434343, 0x4342;
    fma.rn.bf16x2 $3, x, one, offset;
}""")
"""Nibble c: 0x43 before it is 128 + c; codes are c - 8."""
NIBBLES_TO_FP16: tl.constexpr = tl.constexpr("""{
    .reg .b32 low, high, x, offset;
    mov.b32 offset, 0x64086408;
    and.b32 low, $4, 0x0f0f0f0f;
    shr.b32 high, $4, 4;
    and.b32 high, high, 0x0f0f0f0f;
    prmt.b32 x, low, 0x64646464, 0x4140;
    sub.rn.f16x2 $0, x, offset;
    prmt.b32 x, low, 0x64646464, 0x4342;
    sub.rn.f16x2 $1, x, offset;
    prmt.b32 x, high, 0x64646464, 0x4140;
    sub.rn.f16x2 $2, x, offset;
    prmt.b32 x, high, 0x64646464, 0x4342;
    sub.rn.f16x2 $3, x, offset;
}""")
"""Nibble c: 0x64 before it is 1024 + c; codes are c - 8."""


@dataclass(frozen=True, slots=True)
class ProductPlan:
    """A tile: `lines` of x by `rows` of W (gate and up counted apart), `columns` a step, in `splits` parts of them.

    warps and pipeline stages of a program.
    """

    lines: int
    rows: int
    columns: int
    splits: int
    warps: int
    stages: int


@triton.jit
def from_bytes(codes, TYPE: tl.constexpr, PACKED: tl.constexpr):
    """int8 -> TYPE. PACKED: four at a time; conversions of integers are slow."""
    if not PACKED:
        return codes.to(TYPE)
    elif tl.bfloat16 == TYPE:
        return tl.inline_asm_elementwise(BYTES_TO_BF16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(BYTES_TO_FP16, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def from_nibbles(codes, TYPE: tl.constexpr, PACKED: tl.constexpr):
    """uint8 -> codes of the even and of the odd columns in TYPE."""
    if not PACKED:
        return ((codes & 15).to(tl.int8) - 8).to(TYPE), ((codes >> 4).to(tl.int8) - 8).to(TYPE)
    elif tl.bfloat16 == TYPE:
        return tl.inline_asm_elementwise(
            NIBBLES_TO_BF16, "=r,=r,=r,=r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            NIBBLES_TO_FP16, "=r,=r,=r,=r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )


@triton.jit
def halves(pairs, TYPE: tl.constexpr):
    """Integers of twice the width -> the even and the odd columns in TYPE."""
    WIDTH: tl.constexpr = TYPE.primitive_bitwidth
    if WIDTH == 16:
        return pairs.to(tl.int16).to(TYPE, bitcast=True), (pairs >> 16).to(tl.int16).to(TYPE, bitcast=True)
    else:
        return pairs.to(tl.int32).to(TYPE, bitcast=True), (pairs >> 32).to(tl.int32).to(TYPE, bitcast=True)


@triton.jit
def multiply(codes, x, factor, sums, BITS: tl.constexpr, EACH: tl.constexpr, TYPE: tl.constexpr, PACKED: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """sums (rows, lines) + codes (rows, units) x (units, lines). EACH: codes are multiplied by their factors first."""
    if BITS == 4:
        low, high = from_nibbles(codes, TYPE, PACKED)
        even, odd = halves(x, TYPE)
        if EACH:
            low, high = low * factor, high * factor
        sums = tl.dot(low, even, sums, input_precision=PRECISION)
        return tl.dot(high, odd, sums, input_precision=PRECISION)
    else:
        if BITS == 8:
            found = from_bytes(codes, TYPE, PACKED)
        else:
            found = codes
        if EACH:
            found *= factor
        return tl.dot(found, x, sums, input_precision=PRECISION)


@triton.jit
def reduce_head(logits, rows, lines, m, n, best, places, totals):
    """Of each line of a tile (rows, lines): see `triton_matvec.reduce_head`."""
    where = lines * tl.num_programs(0) + tl.program_id(0)
    kept = tl.where((rows < n)[:, None], logits, float("-inf"))
    largest = tl.max(kept, axis=0)
    place = tl.min(tl.where(kept == largest[None, :], rows[:, None], n - 1), axis=0)
    tl.store(best + where, largest, mask=lines < m)
    tl.store(places + where, place, mask=lines < m)
    tl.store(totals + where, tl.sum(tl.exp(kept - largest[None, :]), axis=0), mask=lines < m)


@triton.jit
def finish(sums, factor, lines, out, places, totals, m, n, MODE: tl.constexpr, SCALED: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Stores a tile of results (rows, lines). With GATE its first half is the gate, and the second goes up."""
    if SCALED:
        sums *= factor[:, None]
    OUTPUTS: tl.constexpr = BN // 2 if MODE == 2 else BN
    rows = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    if MODE == 3:
        reduce_head(sums, rows, lines, m, n, out, places, totals)
    else:
        inside = (rows < n)[:, None] & (lines < m)[None, :]
        where = lines.to(tl.int64)[None, :] * n + rows[:, None]
        if MODE == 2:
            gate, up = tl.split(tl.permute(tl.reshape(sums, (2, OUTPUTS, BM)), (1, 2, 0)))
            sums = gate * tl.sigmoid(gate) * up
        if MODE == 1:
            sums += tl.load(out + where, mask=inside, other=0)
        tl.store(out + where, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rows_of(n, BN: tl.constexpr, MODE: tl.constexpr):
    """Rows of W of a program, (BN,): with GATE one half of each half of W. Those beyond n are the last one again."""
    if MODE == 2:
        pair = tl.arange(0, BN)
        HALF: tl.constexpr = BN // 2
        return tl.minimum(tl.program_id(0) * HALF + pair % HALF, n - 1) + (pair // HALF) * n
    else:
        return tl.minimum(tl.program_id(0) * BN + tl.arange(0, BN), n - 1)


@triton.jit
def read(weight, x, starts, own, units, k, EVEN: tl.constexpr):
    """Codes (rows, units) and x (units, lines)."""
    if EVEN:
        return tl.load(weight + starts[:, None] + units[None, :]), tl.load(x + own[None, :] + units[:, None])
    else:
        codes = tl.load(weight + starts[:, None] + units[None, :], mask=(units < k)[None, :], other=0)
        return codes, tl.load(x + own[None, :] + units[:, None], mask=(units < k)[:, None], other=0)


@triton.jit
def sum_parts(first, spot, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """All parts of a tile, added in the order of their columns."""
    sums = tl.load(first + spot, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        sums += tl.load(first + split * SIZE + spot, cache_modifier=".cg")
    return sums


@triton.jit
def part(
    x, weight, scale, starts, groups, own, begin, end, k, shared,
    BITS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, PACKED: tl.constexpr, SETTLE: tl.constexpr,
):  # fmt: skip
    """Sums over the units begin to end, (BN, BM). groups: where each row's scales begin; shared: the first ones."""
    sums = tl.zeros((BN, BM), tl.float32)
    for at in range(begin, end, BK):
        units = at + tl.arange(0, BK)
        codes, y = read(weight, x, starts, own, units, k, EVEN)
        if GROUP == 0:
            sums = multiply(codes, y, 1.0, sums, BITS, False, TYPE, PACKED, PRECISION)
            if SETTLE:
                sums = settled(sums)
        elif GROUP % BK == 0:
            # The scales of the next step: their loads are too narrow to be put into a pipeline.
            ahead = tl.load(scale + groups + tl.minimum(at + BK, k - 1) // GROUP)
            zeros = tl.zeros((BN, BM), tl.float32)
            found = multiply(codes, y, 1.0, zeros, BITS, False, TYPE, PACKED, PRECISION)
            sums += found * shared.to(tl.float32)[:, None]
            shared = ahead
        else:
            where = groups[:, None] + (units // GROUP)[None, :]
            each = tl.load(scale + where, mask=(units < k)[None, :], other=0).to(TYPE)
            sums = multiply(codes, y, each, sums, BITS, True, TYPE, PACKED, PRECISION)
            if SETTLE:
                sums = settled(sums)
    return sums


@triton.jit
def ask(weight, starts, begin, k, AHEAD: tl.constexpr):
    """Asks the level-2 cache for the first AHEAD lines of 128 bytes of each row."""
    WIDTH: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    at = begin + tl.arange(0, AHEAD) * WIDTH
    places = weight + starts[:, None] + tl.minimum(at, k - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def product(
    x, weight, scale, out, places, totals, parts, counters, m, n, k, steps,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, MODE: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, PACKED: tl.constexpr, SETTLE: tl.constexpr, PDL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """out (m, n) = x W^T, with the MODEs of `triton_matvec.matvec`. With GATE W has 2 n rows.

    k, BK and GROUP count units; steps: of BK, a part. parts: (tiles, SPLITS, BM, BN) fp32; counters: a zero for a tile.
    """
    rows, split = rows_of(n, BN, MODE), tl.program_id(2)
    begin = split * steps * BK
    starts = rows.to(tl.int64) * k
    if PDL:
        gdc_launch()
    factor, groups, shared = rows, rows.to(tl.int64), rows
    if SCALED:
        factor = tl.load(scale + rows).to(tl.float32)
    if GROUP:
        groups *= k // GROUP
        shared = tl.load(scale + groups + tl.minimum(begin, k - 1) // GROUP)
    if PDL:
        ask(weight, starts, begin, k, AHEAD)
        gdc_wait()
    lines = tl.program_id(1) * BM + tl.arange(0, BM)
    own = tl.minimum(lines, m - 1).to(tl.int64) * k
    sums = part(x, weight, scale, starts, groups, own, begin, tl.minimum(begin + steps * BK, k), k, shared,
                BITS, GROUP, BM, BN, BK, TYPE, PRECISION, EVEN, PACKED, SETTLE)  # fmt: skip
    if SPLITS == 1:
        finish(sums, factor, lines, out, places, totals, m, n, MODE, SCALED, BM, BN)
    else:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        spot = tl.arange(0, BM)[None, :] * BN + tl.arange(0, BN)[:, None]
        first = parts + tile.to(tl.int64) * (SPLITS * BM * BN)
        tl.store(first + split * (BM * BN) + spot, sums)
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1) == SPLITS - 1:
            sums = sum_parts(first, spot, BM * BN, SPLITS)
            finish(sums, factor, lines, out, places, totals, m, n, MODE, SCALED, BM, BN)
            tl.store(counters + tile, 0)


@triton.jit
def dequantisation(weight, scale, out, n, k, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
                   BK: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """out (n, k) = code * scale."""
    PER: tl.constexpr = 2 if BITS == 4 else 1
    rows = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    stored = (tl.program_id(1) * (BK // PER) + tl.arange(0, BK // PER))[None, :]
    codes = tl.load(weight + rows * (k // PER) + stored, mask=(rows < n) & (stored < k // PER), other=0)
    if BITS == 4:
        low, high = from_nibbles(codes, TYPE, False)
        found = tl.interleave(low, high)
    else:
        found = codes.to(TYPE)
    columns = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    inside = (rows < n) & (columns < k)
    found *= tl.load(scale + rows * (k // GROUP) + columns // GROUP, mask=inside, other=0).to(TYPE)
    tl.store(out + rows * k + columns, found, mask=inside)


LEAST_PART = 512
"""Fewest columns of a part: below, putting parts together costs more than it gains."""
LEAST_STEP = 32
"""Fewest columns of a step: both halves of 4-bit codes then are a product of 16, the tensor cores' least."""
WIDEST_FP32 = 32
"""Most columns of a step in fp32, which the tensor cores do not take: operands are in registers."""

PLAIN, DEEP, GATE, HEAD = "plain", "deep", "gate", "head"
"""Shapes of W: at least as many rows as columns; fewer; gate and up together; the vocabulary."""

TILES = {
    ("codes", 8): {PLAIN: (32, 256, 256, 2, 4), DEEP: (64, 256, 256, 2, 4),
                   GATE: (64, 256, 384, 2, 4), HEAD: (32, 256, 1, 2, 4)},
    ("codes", 16): {PLAIN: (32, 256, 512, 2, 4), DEEP: (32, 256, 512, 2, 4),
                    GATE: (32, 256, 384, 2, 4), HEAD: (64, 256, 1, 2, 4)},
    ("codes", 32): {PLAIN: (64, 256, 256, 4, 3), DEEP: (64, 256, 256, 4, 3),
                    GATE: (32, 128, 768, 2, 4), HEAD: (32, 128, 1, 2, 4)},
    ("codes", 64): {PLAIN: (64, 256, 128, 4, 3), DEEP: (64, 256, 128, 4, 3),
                    GATE: (64, 128, 384, 4, 3), HEAD: (128, 64, 1, 4, 3)},
    ("codes", 256): {PLAIN: (128, 64, 264, 8, 3), DEEP: (128, 64, 264, 8, 3),
                     GATE: (128, 64, 264, 8, 3), HEAD: (64, 64, 1, 4, 3)},
    ("floats", 16): {PLAIN: (128, 256, 128, 4, 4), DEEP: (128, 256, 128, 4, 4),
                     GATE: (64, 256, 384, 4, 3), HEAD: (16, 256, 1, 1, 5)},
    ("floats", 32): {PLAIN: (64, 256, 256, 4, 4), DEEP: (64, 256, 256, 4, 4),
                     GATE: (64, 256, 384, 4, 3), HEAD: (64, 256, 1, 4, 4)},
    ("floats", 64): {PLAIN: (64, 256, 128, 4, 5), DEEP: (64, 256, 128, 4, 4),
                     GATE: (64, 128, 192, 4, 5), HEAD: (128, 128, 1, 4, 3)},
    ("floats", 256): {PLAIN: (128, 64, 264, 8, 3), DEEP: (128, 64, 264, 8, 3),
                      GATE: (128, 64, 264, 8, 3), HEAD: (128, 128, 1, 8, 4)},
}  # fmt: skip
"""By what the weights are and the most rows of x: rows, columns (halved for weights in 16 bits), programs to aim at,
warps and stages. The fastest of a dozen or two on an H200, for the matrices of 1.7B. Of so many stages all but one lie
in shared memory before Hopper, of which GPUs for games have less than half: as many as fit there."""

AHEAD = {16: 2, 8: 1, 4: 1}
"""Lines of 128 bytes of each row of W, by the bits of a weight, that a program asks for before the kernel before has
ended: 1 to 2 % of a step. More is slower."""
LINES = {8: 8, 16: 16, 32: 32, 64: 64, 256: 128}
HEAD_LINES = 256
"""Of the head where it is more than LINES: it is so large that to read it twice costs more than anything else."""


def plan(matrix: Matrix, m: int, memory: int, *, gate: bool, head: bool = False) -> ProductPlan:
    """The tile for m, in as many parts as give the programs that are aimed at; the head, which is reduced, in one.

    memory: bytes of shared memory that a program may have.
    """
    kind = HEAD if head else GATE if gate else DEEP if matrix.columns > matrix.rows else PLAIN
    weights = "floats" if matrix.bits == 16 else "codes"
    most = next((size for size in LINES if m <= size and (weights, size) in TILES), 256)
    rows, columns, programs, warps, stages = TILES[weights, most][kind]
    tiles = triton.cdiv(matrix.rows, rows) * triton.cdiv(m, LINES[most])
    parts = min(programs // tiles, matrix.columns // LEAST_PART)
    splits = block(parts + 1) // 2 if parts else 1
    large = head and m > LINES[most] and matrix.dtype != torch.float32
    lines, step = HEAD_LINES if large else LINES[most], _step(matrix, columns)
    width = matrix.bits if matrix.scale is not None else 8 * matrix.dtype.itemsize
    held = step * (rows * width // 8 + lines * matrix.dtype.itemsize)
    return ProductPlan(lines, rows, step, splits, warps, min(stages, memory // held + 1))


def _step(matrix: Matrix, most: int) -> int:
    """Columns of a step: no more than share a scale, where the tensor cores take so few."""
    least = LEAST_STEP if matrix.bits == 4 else LEAST_STEP // 2
    shared = matrix.group & -matrix.group
    most = min(most, WIDEST_FP32) if matrix.dtype == torch.float32 else most // (2 if matrix.bits == 16 else 1)
    return most if matrix.group == matrix.columns or shared < least else min(most, shared)
