"""Attention over the cache for rows of any lengths; with one new token a row, its norms, RoPE and write too.

A program takes one row, one key head and a part of the positions. The last part of a row and head to end puts the
parts together (flash decoding, Dao et al. 2023), always in the same order, so that a result never depends on timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from quasr.kernels.triton_launch import block, gdc_launch, gdc_wait, launch_options, pdl_works, wide_fits

if TYPE_CHECKING:
    from torch import Tensor

    from quasr.kernels.matrix import Heads
    from quasr.kernels.state import Places

LOG2_E = 1.4426950408889634
"""Scores are multiplied by it, so that powers of 2 do for those of e."""
LEAST_DOT = 16
"""Fewest rows that the tensor cores take."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """splits: parts of a row's positions; positions: of one step of a part; warps and pipeline stages of a program."""

    splits: int
    positions: int
    warps: int
    stages: int


@triton.jit
def turn(rates, place, SIZE: tl.constexpr, DP: tl.constexpr):
    """Cosines and sines (DP,) of RoPE at `place`, a sine with the sign of its half."""
    d = tl.arange(0, DP)
    angle = place.to(tl.float32) * tl.load(rates + d % (SIZE // 2), mask=d < SIZE, other=0)
    return tl.cos(angle), tl.where(d < SIZE // 2, -tl.sin(angle), tl.sin(angle))


@triton.jit
def halves(norm, SIZE: tl.constexpr, DP: tl.constexpr):
    """A norm's weights (DP,), and those of the other half of the head."""
    d = tl.arange(0, DP)
    here = tl.load(norm + d, mask=d < SIZE, other=0).to(tl.float32)
    return here, tl.load(norm + (d + SIZE // 2) % SIZE, mask=d < SIZE, other=0).to(tl.float32)


@triton.jit
def turned(x, where, here_norm, there_norm, cosine, sine, eps, inside, SIZE: tl.constexpr, DP: tl.constexpr):
    """Heads of x at offsets `where` (heads,), normed and rotated: (heads, DP) fp32. See `halves` and `turn`."""
    d = tl.arange(0, DP)
    other = (d + SIZE // 2) % SIZE
    known = inside[:, None] & (d < SIZE)[None, :]
    here = tl.load(x + where[:, None] + d[None, :], mask=known, other=0).to(tl.float32)
    there = tl.load(x + where[:, None] + other[None, :], mask=known, other=0).to(tl.float32)
    rms = tl.rsqrt(tl.sum(here * here, axis=1) / SIZE + eps)
    rotated = here * (here_norm * cosine)[None, :] + there * (there_norm * sine)[None, :]
    return rotated * rms[:, None]


@triton.jit
def merge(out, parts, marks, row, kv, base, HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr,
          SPLITS: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """Puts the parts of one row and key head together. marks: their maxima and sums, (parts, 2, GP)."""
    GROUP: tl.constexpr = HEADS // KV
    d = tl.arange(0, DP)
    splits = base + tl.arange(0, SPLITS)
    for g in tl.static_range(GROUP):
        tops = tl.load(marks + splits * 2 * GP + g, cache_modifier=".cg")
        weights = tl.load(marks + splits * 2 * GP + GP + g, cache_modifier=".cg")
        sums = tl.load(parts + (splits * GP + g)[:, None] * DP + d[None, :], cache_modifier=".cg")
        largest = tl.max(tops, axis=0)
        shares = tl.exp2(tops - tl.where(largest == float("-inf"), 0.0, largest))
        total = tl.sum(shares * weights, axis=0)
        mean = tl.sum(shares[:, None] * sums, axis=0) / tl.where(total > 0, total, 1.0)
        where = (row * HEADS + kv * GROUP + g) * SIZE + d
        tl.store(out + where, mean.to(out.dtype.element_ty), mask=d < SIZE)


@triton.jit
def store(out, sums, total, row, kv, HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr,
          LANES: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """sums / total, and zeros for a row without positions."""
    GROUP: tl.constexpr = HEADS // KV
    g, d = tl.arange(0, LANES), tl.arange(0, DP)
    mean = sums / tl.where(total > 0, total, 1.0)[:, None]
    where = (row * HEADS + kv * GROUP + g)[:, None] * SIZE + d[None, :]
    tl.store(out + where, mean.to(out.dtype.element_ty), mask=(g < GROUP)[:, None] & (d < SIZE)[None, :])


@triton.jit
def block_of(keys, values, base, begin, end, SIZE: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr):
    """Keys and values (BLOCK, DP) of the positions from `begin` on, zeros from `end` on."""
    p, d = begin + tl.arange(0, BLOCK), tl.arange(0, DP)
    known = (p < end)[:, None] & (d < SIZE)[None, :]
    where = base + p[:, None] * SIZE + d[None, :]
    return tl.load(keys + where, mask=known, other=0), tl.load(values + where, mask=known, other=0)


@triton.jit
def look(q, k, v, begin, end, largest, weight, sums, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """One block more: the running maxima, sums of exponentials (LANES,) and weighted values (LANES, DP)."""
    p = begin + tl.arange(0, BLOCK)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = tl.where((p < end)[None, :], scores, float("-inf"))
    raised = tl.maximum(largest, tl.max(scores, axis=1))
    safe = tl.where(raised == float("-inf"), 0.0, raised)
    shares = tl.exp2(scores - safe[:, None])
    keep = tl.exp2(largest - safe)
    weight = weight * keep + tl.sum(shares, axis=1)
    sums = sums * keep[:, None] + tl.dot(shares.to(v.dtype), v, input_precision=PRECISION)
    return raised, weight, sums


@triton.jit
def attention(
    x, keys, values, offsets, lengths, idle, q_norm, k_norm, rates, out, parts, marks, counters,
    stride, q_eps, k_eps, scale, positions,
    HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr, GP: tl.constexpr, LANES: tl.constexpr,
    DP: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """FUSED: x holds q, k, v of one new token a row, as a product made them. Otherwise x holds queries, rotated.

    What the cache holds of earlier steps, and where, does not depend on the kernel before: with FUSED those loads
    start before it has ended. That is safe as long as some kernel of the step (the embedding) lets its successors
    start only after its own wait, so that the step before is over.
    """
    GROUP: tl.constexpr = HEADS // KV
    if PDL and not FUSED:
        gdc_wait()
        gdc_launch()
    row, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    last = tl.load(lengths + row)
    total = tl.where(tl.load(idle + row) != 0, 0, last + 1)
    span = tl.cdiv(tl.cdiv(total, SPLITS), BLOCK) * BLOCK
    start = split * span
    end = tl.minimum(start + span, total)
    old = tl.minimum(end, last) if FUSED else end
    base = (kv.to(tl.int64) * positions + tl.load(offsets + row)) * SIZE
    k, v = block_of(keys, values, base, start, old, SIZE, DP, BLOCK)
    if FUSED:
        q_here, q_there = halves(q_norm, SIZE, DP)
        k_here, k_there = halves(k_norm, SIZE, DP)
        cosine, sine = turn(rates, last, SIZE, DP)
    if PDL and FUSED:
        gdc_wait()
        gdc_launch()
    g, d = tl.arange(0, LANES), tl.arange(0, DP)
    heads = row.to(tl.int64) * stride + (kv * GROUP + g) * SIZE
    if FUSED:
        q = turned(x, heads, q_here, q_there, cosine, sine, q_eps, g < GROUP, SIZE, DP)
    else:
        known = (g < GROUP)[:, None] & (d < SIZE)[None, :]
        q = tl.load(x + heads[:, None] + d[None, :], mask=known, other=0).to(tl.float32)
    q = (q.to(keys.dtype.element_ty).to(tl.float32) * scale).to(keys.dtype.element_ty)
    largest = tl.full((LANES,), float("-inf"), tl.float32)
    sums, weight = tl.zeros((LANES, DP), tl.float32), tl.zeros((LANES,), tl.float32)
    if FUSED:
        one = tl.zeros((1,), tl.int64)
        own = row.to(tl.int64) * stride + (HEADS + kv) * SIZE
        new_k = turned(x, own + one, k_here, k_there, cosine, sine, k_eps, one == 0, SIZE, DP)
        new_k = new_k.to(keys.dtype.element_ty)
        new_v = tl.load(x + own + KV * SIZE + d[None, :] + one[:, None], mask=(d < SIZE)[None, :], other=0)
        new_v = new_v.to(keys.dtype.element_ty)
        mine = (last >= start) & (last < end)
        tl.store(keys + base + last * SIZE + d[None, :], new_k, mask=(d < SIZE)[None, :] & mine)
        tl.store(values + base + last * SIZE + d[None, :], new_v, mask=(d < SIZE)[None, :] & mine)
        # The part that owns the new position begins with it.
        score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), axis=1)
        largest = tl.where(mine, score, largest)
        weight = tl.where(mine, 1.0, weight)
        sums = tl.where(mine, new_v.to(tl.float32), sums)
    largest, weight, sums = look(q, k, v, start, old, largest, weight, sums, BLOCK, PRECISION)
    for begin in range(start + BLOCK, old, BLOCK):
        k, v = block_of(keys, values, base, begin, old, SIZE, DP, BLOCK)
        largest, weight, sums = look(q, k, v, begin, old, largest, weight, sums, BLOCK, PRECISION)
    if SPLITS == 1:
        store(out, sums, weight, row, kv, HEADS, KV, SIZE, LANES, DP)
    else:
        first = (row * KV + kv) * SPLITS
        tl.store(parts + ((first + split) * GP + g)[:, None] * DP + d[None, :], sums, mask=(g < GROUP)[:, None])
        tl.store(marks + (first + split) * 2 * GP + g, largest, mask=g < GROUP)
        tl.store(marks + (first + split) * 2 * GP + GP + g, weight, mask=g < GROUP)
        tl.debug_barrier()
        if tl.atomic_add(counters + row * KV + kv, 1) == SPLITS - 1:
            merge(out, parts, marks, row, kv, first, HEADS, KV, SIZE, SPLITS, GP, DP)
            tl.store(counters + row * KV + kv, 0)


@cache
def _counters(count: int, device: torch.device) -> Tensor:
    """Zeros, which every launch leaves as zeros."""
    return torch.zeros(count, dtype=torch.int32, device=device)


def plan(rows: int, heads: Heads, *, wide: bool) -> AttentionPlan:
    """Some programs for each of the 132 multiprocessors of an H200, and no more parts than pay.

    wide: see `triton_launch.wide_fits`.
    """
    splits = max(1, min(8, 512 // (rows * heads.kv_count)))
    warps, stages = (4, 3) if rows == 1 else (2, 2)
    return AttentionPlan(block(splits + 1) // 2, 64 if wide else 32, warps, stages)


def attend(x: Tensor, keys: Tensor, values: Tensor, places: Places, heads: Heads) -> Tensor:
    """See `reference.attend`."""
    return run(x, (keys, values), places, heads, fused=False)


def attend_step(x: Tensor, keys: Tensor, values: Tensor, places: Places, heads: Heads) -> Tensor:
    """See `reference.attend_step`."""
    return run(x, (keys, values), places, heads, fused=True)


def run(x: Tensor, layer: tuple[Tensor, Tensor], places: Places, heads: Heads, *, fused: bool) -> Tensor:
    """Launches `attention`: (m, width or query_width) -> (m, query_width)."""
    chosen = plan(len(x), heads, wide=wide_fits(layer[0]))
    group, width = block(heads.count // heads.kv_count), block(heads.size, LEAST_DOT)
    out = x.new_empty(len(x), heads.query_width)
    many = len(x) * heads.kv_count
    parts = torch.empty(many * chosen.splits * group, width, dtype=torch.float32, device=x.device)
    marks = torch.empty(many * chosen.splits * 2 * group, dtype=torch.float32, device=x.device)
    pdl = pdl_works(x.device)
    attention[len(x), heads.kv_count, chosen.splits](
        x, *layer, places.offsets, places.lengths, places.idle,
        heads.q_norm.weight, heads.k_norm.weight, heads.rates, out, parts, marks, _counters(block(many, 64), x.device),
        x.stride(0), heads.q_norm.eps, heads.k_norm.eps, heads.size**-0.5 * LOG2_E, layer[0].shape[1],
        HEADS=heads.count, KV=heads.kv_count, SIZE=heads.size, GP=group, LANES=max(group, LEAST_DOT), DP=width,
        SPLITS=chosen.splits, BLOCK=chosen.positions, FUSED=fused,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", PDL=pdl,
        **launch_options(chosen.warps, pdl, chosen.stages),
    )  # fmt: skip
    return out
