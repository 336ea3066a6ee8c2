"""Query and key norms, RoPE, the write into the cache and attention over it, for rows of any lengths.

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

from quasr.kernels.triton_launch import block, gdc_launch, gdc_wait, launch_options, pdl_works

if TYPE_CHECKING:
    from torch import Tensor

    from quasr.kernels.matrix import Heads
    from quasr.kernels.state import Places

LOG2_E = 1.4426950408889634
LEAST_DOT = 16
"""Fewest rows that the tensor cores take."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """splits: parts of a row's positions; positions: of one step of a part; warps a program."""

    splits: int
    positions: int
    warps: int


@triton.jit
def turned(x, where, norm, rates, place, eps, inside, SIZE: tl.constexpr, DP: tl.constexpr):
    """Heads of x at offsets `where` (heads,), normed and rotated to `place`: (heads, DP) fp32."""
    d = tl.arange(0, DP)
    other = (d + SIZE // 2) % SIZE
    known = inside[:, None] & (d < SIZE)[None, :]
    here = tl.load(x + where[:, None] + d[None, :], mask=known, other=0).to(tl.float32)
    there = tl.load(x + where[:, None] + other[None, :], mask=known, other=0).to(tl.float32)
    rms = tl.rsqrt(tl.sum(here * here, axis=1) / SIZE + eps)
    here *= tl.load(norm + d, mask=d < SIZE, other=0).to(tl.float32)[None, :]
    there *= tl.load(norm + other, mask=d < SIZE, other=0).to(tl.float32)[None, :]
    angle = place.to(tl.float32) * tl.load(rates + d % (SIZE // 2), mask=d < SIZE, other=0)
    sine = tl.where(d < SIZE // 2, -tl.sin(angle), tl.sin(angle))
    return (here * tl.cos(angle)[None, :] + there * sine[None, :]) * rms[:, None]


@triton.jit
def merge(out, parts, marks, row, kv, base, HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr,
          SPLITS: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """Puts the parts of one row and key head together. marks: their maxima and sums, (parts, 2, GP)."""
    g, d = tl.arange(0, GP), tl.arange(0, DP)
    largest = tl.full((GP,), float("-inf"), tl.float32)
    for split in range(SPLITS):
        largest = tl.maximum(largest, tl.load(marks + (base + split) * 2 * GP + g, cache_modifier=".cg"))
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total, sums = tl.zeros((GP,), tl.float32), tl.zeros((GP, DP), tl.float32)
    for split in range(SPLITS):
        mark = marks + (base + split) * 2 * GP + g
        share = tl.exp2(tl.load(mark, cache_modifier=".cg") - largest)
        total += share * tl.load(mark + GP, cache_modifier=".cg")
        part = parts + ((base + split) * GP + g)[:, None] * DP + d[None, :]
        sums += share[:, None] * tl.load(part, cache_modifier=".cg")
    store(out, sums, total, row, kv, HEADS, KV, SIZE, GP, DP)


@triton.jit
def store(out, sums, total, row, kv, HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr,
          GP: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """sums / total, and zeros for a row without positions."""
    GROUP: tl.constexpr = HEADS // KV
    g, d = tl.arange(0, GP), tl.arange(0, DP)
    mean = sums / tl.where(total > 0, total, 1.0)[:, None]
    where = (row * HEADS + kv * GROUP + g)[:, None] * SIZE + d[None, :]
    tl.store(out + where, mean.to(out.dtype.element_ty), mask=(g < GROUP)[:, None] & (d < SIZE)[None, :])


@triton.jit
def attention(
    x, keys, values, offsets, lengths, idle, q_norm, k_norm, rates, out, parts, marks, counters,
    stride, q_eps, k_eps, scale, positions,
    HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """FUSED: x holds q, k, v of one new token a row, as a product made them. Otherwise x holds queries, rotated."""
    GROUP: tl.constexpr = HEADS // KV
    if PDL:
        gdc_wait()
        gdc_launch()
    row, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    last = tl.load(lengths + row)
    total = tl.where(tl.load(idle + row) != 0, 0, last + 1)
    span = tl.cdiv(tl.cdiv(total, SPLITS), BLOCK) * BLOCK
    start = split * span
    end = tl.minimum(start + span, total)
    g, d = tl.arange(0, GP), tl.arange(0, DP)
    heads = row.to(tl.int64) * stride + (kv * GROUP + g) * SIZE
    if FUSED:
        q = turned(x, heads, q_norm, rates, last, q_eps, g < GROUP, SIZE, DP)
    else:
        known = (g < GROUP)[:, None] & (d < SIZE)[None, :]
        q = tl.load(x + heads[:, None] + d[None, :], mask=known, other=0).to(tl.float32)
    q = (q.to(keys.dtype.element_ty).to(tl.float32) * (scale * 1.4426950408889634)).to(keys.dtype.element_ty)
    base = (kv.to(tl.int64) * positions + tl.load(offsets + row)) * SIZE
    if FUSED:
        one = tl.zeros((1,), tl.int64)
        own = row.to(tl.int64) * stride + (HEADS + kv) * SIZE
        new_k = turned(x, own + one, k_norm, rates, last, k_eps, one == 0, SIZE, DP).to(keys.dtype.element_ty)
        new_v = tl.load(x + own + KV * SIZE + d[None, :] + one[:, None], mask=(d < SIZE)[None, :], other=0)
        mine = (d < SIZE)[None, :] & (last >= start) & (last < end)
        tl.store(keys + base + last * SIZE + d[None, :], new_k, mask=mine)
        tl.store(values + base + last * SIZE + d[None, :], new_v.to(keys.dtype.element_ty), mask=mine)
    largest = tl.full((GP,), float("-inf"), tl.float32)
    sums, weight = tl.zeros((GP, DP), tl.float32), tl.zeros((GP,), tl.float32)
    for begin in range(start, end, BLOCK):
        p = begin + tl.arange(0, BLOCK)
        known = (p < end)[:, None] & (d < SIZE)[None, :]
        if FUSED:
            known = known & (p != last)[:, None]
        where = base + p[:, None] * SIZE + d[None, :]
        k = tl.load(keys + where, mask=known, other=0)
        v = tl.load(values + where, mask=known, other=0)
        if FUSED:
            k = tl.where((p == last)[:, None], new_k, k)
            v = tl.where((p == last)[:, None], new_v.to(v.dtype), v)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where((p < end)[None, :], scores, float("-inf"))
        raised = tl.maximum(largest, tl.max(scores, axis=1))
        shares = tl.exp2(scores - raised[:, None])
        keep = tl.exp2(largest - raised)
        weight = weight * keep + tl.sum(shares, axis=1)
        sums = sums * keep[:, None] + tl.dot(shares.to(v.dtype), v, input_precision=PRECISION)
        largest = raised
    if SPLITS == 1:
        store(out, sums, weight, row, kv, HEADS, KV, SIZE, GP, DP)
    else:
        first = (row * KV + kv) * SPLITS
        tl.store(parts + ((first + split) * GP + g)[:, None] * DP + d[None, :], sums)
        tl.store(marks + (first + split) * 2 * GP + g, largest)
        tl.store(marks + (first + split) * 2 * GP + GP + g, weight)
        tl.debug_barrier()
        if tl.atomic_add(counters + row * KV + kv, 1) == SPLITS - 1:
            merge(out, parts, marks, row, kv, first, HEADS, KV, SIZE, SPLITS, GP, DP)
            tl.store(counters + row * KV + kv, 0)


@triton.jit
def rotation(
    x, keys, values, offsets, lengths, idle, q_norm, k_norm, rates, out, q_eps, k_eps, positions,
    HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr, DP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one token a program: query heads first, then key heads, then value heads."""
    if PDL:
        gdc_wait()
        gdc_launch()
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, DP)[None, :]
    place = tl.load(lengths + row)
    busy = tl.load(idle + row) == 0
    one = tl.zeros((1,), tl.int64)
    start = (row.to(tl.int64) * (HEADS + 2 * KV) + head) * SIZE + one
    if head < HEADS:
        y = turned(x, start, q_norm, rates, place, q_eps, one == 0, SIZE, DP)
        target = (row.to(tl.int64) * HEADS + head) * SIZE + d
        tl.store(out + target, y.to(out.dtype.element_ty), mask=d < SIZE)
    else:
        kv = (head - HEADS) % KV
        target = (kv.to(tl.int64) * positions + tl.load(offsets + row) + place) * SIZE + d
        if head < HEADS + KV:
            y = turned(x, start, k_norm, rates, place, k_eps, one == 0, SIZE, DP)
            tl.store(keys + target, y.to(keys.dtype.element_ty), mask=(d < SIZE) & busy)
        else:
            v = tl.load(x + start[:, None] + d, mask=d < SIZE, other=0)
            tl.store(values + target, v.to(values.dtype.element_ty), mask=(d < SIZE) & busy)


@cache
def _counters(count: int, device: torch.device) -> Tensor:
    """Zeros, which every launch leaves as zeros."""
    return torch.zeros(count, dtype=torch.int32, device=device)


def plan(rows: int, heads: Heads) -> AttentionPlan:
    """About two programs for each of the 132 multiprocessors of an H200, and no more parts than pay."""
    splits = max(1, min(16, 256 // (rows * heads.kv_count)))
    return AttentionPlan(block(splits + 1) // 2, 32, 4)


def rotate_write(x: Tensor, keys: Tensor, values: Tensor, places: Places, heads: Heads) -> Tensor:
    """See `reference.rotate_write`."""
    out = x.new_empty(len(x), heads.query_width)
    pdl = pdl_works(x.device)
    rotation[len(x), heads.count + 2 * heads.kv_count](
        x, keys, values, places.offsets, places.lengths, places.idle,
        heads.q_norm.weight, heads.k_norm.weight, heads.rates, out, heads.q_norm.eps, heads.k_norm.eps, keys.shape[1],
        HEADS=heads.count, KV=heads.kv_count, SIZE=heads.size, DP=block(heads.size), PDL=pdl,
        **launch_options(1, pdl),
    )  # fmt: skip
    return out


def attend(x: Tensor, keys: Tensor, values: Tensor, places: Places, heads: Heads) -> Tensor:
    """See `reference.attend`."""
    return run(x, (keys, values), places, heads, fused=False)


def attend_step(x: Tensor, keys: Tensor, values: Tensor, places: Places, heads: Heads) -> Tensor:
    """See `reference.attend_step`."""
    return run(x, (keys, values), places, heads, fused=True)


def run(x: Tensor, layer: tuple[Tensor, Tensor], places: Places, heads: Heads, *, fused: bool) -> Tensor:
    """Launches `attention`: (m, width or query_width) -> (m, query_width)."""
    chosen = plan(len(x), heads)
    group, width = block(heads.count // heads.kv_count, LEAST_DOT), block(heads.size, LEAST_DOT)
    out = x.new_empty(len(x), heads.query_width)
    many = len(x) * heads.kv_count
    parts = torch.empty(many * chosen.splits * group, width, dtype=torch.float32, device=x.device)
    marks = torch.empty(many * chosen.splits * 2 * group, dtype=torch.float32, device=x.device)
    pdl = pdl_works(x.device)
    attention[len(x), heads.kv_count, chosen.splits](
        x, *layer, places.offsets, places.lengths, places.idle,
        heads.q_norm.weight, heads.k_norm.weight, heads.rates, out, parts, marks, _counters(block(many, 64), x.device),
        x.stride(0), heads.q_norm.eps, heads.k_norm.eps, heads.size**-0.5, layer[0].shape[1],
        HEADS=heads.count, KV=heads.kv_count, SIZE=heads.size, GP=group, DP=width, SPLITS=chosen.splits,
        BLOCK=chosen.positions, FUSED=fused, PRECISION="ieee" if x.dtype == torch.float32 else "tf32", PDL=pdl,
        **launch_options(chosen.warps, pdl),
    )  # fmt: skip
    return out
