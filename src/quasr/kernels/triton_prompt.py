"""Kernels of whole prompts: norms and RoPE of all heads of a token at once, and causal attention inside each prompt.

Prompts lie packed, one after the other; their keys and values are neighbours in the cache. Both are read where they
are, so that nothing is gathered or padded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from quasr.kernels.triton_attention import LEAST_DOT, LOG2_E
from quasr.kernels.triton_launch import INTERPRETED, block, gdc_launch, gdc_wait, launch_options, pdl_works, settled

if TYPE_CHECKING:
    from torch import Tensor

    from quasr.kernels.matrix import Heads
    from quasr.kernels.state import Places, Prompts

HEADS_AT_ONCE = 8
"""That a warp rotates: it has 16 bytes of four heads in each load, and waits for two such loads."""
PROMPTS = 32
"""Fewer are looked for as so many are, so that one kernel serves them."""
QUERIES, KEYS = 128, 64
"""Rows of a program of attention, tokens times the heads that share a key head; and keys of a step. Both are the same
for all prompts, so that a token's numbers do not depend on what it is computed beside."""


@triton.jit
def turned(x, where, known, norm, cosine, sine, eps, SIZE: tl.constexpr, FP: tl.constexpr):
    """Normed and rotated heads (heads, FP) fp32 whose halves begin at `where`: the low halves and the high ones."""
    f = tl.arange(0, FP)
    low = tl.load(x + where, mask=known, other=0).to(tl.float32)
    high = tl.load(x + where + SIZE // 2, mask=known, other=0).to(tl.float32)
    rms = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / SIZE + eps)[:, None]
    low *= rms * tl.load(norm + f, mask=f < SIZE // 2, other=0).to(tl.float32)[None, :]
    high *= rms * tl.load(norm + SIZE // 2 + f, mask=f < SIZE // 2, other=0).to(tl.float32)[None, :]
    return low * cosine[None, :] - high * sine[None, :], high * cosine[None, :] + low * sine[None, :]


@triton.jit(do_not_specialize_on_alignment=("offsets", "lengths"))
def rotation(
    x, keys, values, offsets, lengths, idle, q_norm, k_norm, rates, out, q_eps, k_eps, positions,
    HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr, FP: tl.constexpr, BH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token a program, BH heads at a time: query heads first, then key heads, then value heads."""
    if PDL:
        gdc_wait()
        gdc_launch()
    row = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = SIZE // 2
    f, h = tl.arange(0, FP), tl.arange(0, BH)[:, None]
    place = tl.load(lengths + row)
    busy = tl.load(idle + row) == 0
    angle = place.to(tl.float32) * tl.load(rates + f, mask=f < HALF, other=0)
    cosine, sine = tl.cos(angle), tl.sin(angle)
    own = x + row * (HEADS + 2 * KV) * SIZE
    for first in tl.static_range(0, HEADS, BH):
        where = (first + h) * SIZE + f[None, :]
        known = (first + h < HEADS) & (f < HALF)[None, :]
        low, high = turned(own, where, known, q_norm, cosine, sine, q_eps, SIZE, FP)
        target = out + row * HEADS * SIZE + where
        tl.store(target, low.to(out.dtype.element_ty), mask=known)
        tl.store(target + HALF, high.to(out.dtype.element_ty), mask=known)
    begin = (tl.load(offsets + row) + place) * SIZE
    for first in tl.static_range(0, KV, BH):
        where = (HEADS + first + h) * SIZE + f[None, :]
        known = (first + h < KV) & (f < HALF)[None, :]
        low, high = turned(own, where, known, k_norm, cosine, sine, k_eps, SIZE, FP)
        low_v = tl.load(own + where + KV * SIZE, mask=known, other=0)
        high_v = tl.load(own + where + KV * SIZE + HALF, mask=known, other=0)
        target = begin + (first + h).to(tl.int64) * positions * SIZE + f[None, :]
        tl.store(keys + target, low.to(keys.dtype.element_ty), mask=known & busy)
        tl.store(keys + target + HALF, high.to(keys.dtype.element_ty), mask=known & busy)
        tl.store(values + target, low_v.to(values.dtype.element_ty), mask=known & busy)
        tl.store(values + target + HALF, high_v.to(values.dtype.element_ty), mask=known & busy)


@triton.jit
def look(query, keys, values, here, known, p, token, scale, state, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
         SETTLE: tl.constexpr):  # fmt: skip
    """One block of keys more. state: the running maxima, sums of exponentials (BM,) and weighted values (BM, DP)."""
    largest, weight, sums = state
    k = tl.load(keys + here, mask=known, other=0)
    v = tl.load(values + here, mask=known, other=0)
    scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
    if DIAGONAL:
        scores = tl.where(p[None, :] <= token[:, None], scores, float("-inf"))
    raised = tl.maximum(largest, tl.max(scores, axis=1))
    shares = tl.exp2(scores - raised[:, None])
    keep = tl.exp2(largest - raised)
    weight = weight * keep + tl.sum(shares, axis=1)
    sums = sums * keep[:, None] + tl.dot(shares.to(v.dtype), v, input_precision=PRECISION)
    if SETTLE:
        sums = settled(sums)
    return raised, weight, sums


@triton.jit(do_not_specialize=("prompts",), do_not_specialize_on_alignment=("starts", "begins"))
def attention(
    q, keys, values, starts, begins, out, scale, positions, prompts,
    HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PP: tl.constexpr, PRECISION: tl.constexpr, SETTLE: tl.constexpr,
):  # fmt: skip
    """BM / GP tokens of one prompt, with all the query heads of one key head (flash attention, Dao et al. 2022).

    Prompt i has the places from `starts[i] // TOKENS + i` on, which are enough: so the grid needs to know how many
    prompts and tokens there may be, and no length. The last tokens of a prompt, which see most, begin first.
    """
    GROUP: tl.constexpr = HEADS // KV
    TOKENS: tl.constexpr = BM // GP
    kv, place = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    i = tl.arange(0, PP)
    own = tl.load(starts + i, mask=i < prompts, other=0).to(tl.int32) // TOKENS + i
    prompt = tl.sum(((i < prompts) & (own <= place)).to(tl.int32), axis=0) - 1
    start = tl.load(starts + prompt).to(tl.int32)
    count = tl.load(starts + prompt + 1).to(tl.int32) - start
    first = (place - start // TOKENS - prompt) * TOKENS
    if first < count:
        r, d = tl.arange(0, BM), tl.arange(0, DP)
        token, g = first + r // GP, r % GP
        where = ((start + token).to(tl.int64) * HEADS + kv * GROUP + g)[:, None] * SIZE + d[None, :]
        mine = ((token < count) & (g < GROUP))[:, None] & (d < SIZE)[None, :]
        query = tl.load(q + where, mask=mine, other=0)
        base = (kv.to(tl.int64) * positions + tl.load(begins + prompt)) * SIZE
        keys += base
        values += base
        state = (
            tl.full((BM,), float("-inf"), tl.float32),
            tl.zeros((BM,), tl.float32),
            tl.zeros((BM, DP), tl.float32),
        )
        p = tl.arange(0, BN)
        here = p[:, None] * SIZE + d[None, :]
        inside = (d < SIZE)[None, :] & (p < BN)[:, None]
        diagonal = first // BN * BN
        for begin in range(0, diagonal, BN):
            places = begin * SIZE + here
            state = look(query, keys, values, places, inside, p, token, scale, state, False, PRECISION, SETTLE)
        end = tl.minimum(first + TOKENS, count)
        for begin in range(diagonal, end, BN):
            known = inside & (begin + p < end)[:, None]
            places = begin * SIZE + here
            state = look(query, keys, values, places, known, begin + p, token, scale, state, True, PRECISION, SETTLE)
        found = state[2] * (1 / state[1])[:, None]
        tl.store(out + where, found.to(out.dtype.element_ty), mask=mine)


def rotate_write(x: Tensor, keys: Tensor, values: Tensor, places: Places, heads: Heads) -> Tensor:
    """See `reference.rotate_write`."""
    out = x.new_empty(len(x), heads.query_width)
    pdl = pdl_works(x.device)
    rotation[len(x),](
        x, keys, values, places.offsets, places.lengths, places.idle,
        heads.q_norm.weight, heads.k_norm.weight, heads.rates, out, heads.q_norm.eps, heads.k_norm.eps, keys.shape[1],
        HEADS=heads.count, KV=heads.kv_count, SIZE=heads.size, FP=block(heads.size // 2),
        BH=block(heads.count, most=HEADS_AT_ONCE), PDL=pdl, **launch_options(1, pdl),
    )  # fmt: skip
    return out


def attend_prompts(q: Tensor, keys: Tensor, values: Tensor, prompts: Prompts, heads: Heads) -> Tensor:
    """See `reference.attend_prompts`. Reads nothing on the host: tokens behind the last prompt get no value."""
    out = torch.empty_like(q)
    group, count = block(heads.count // heads.kv_count), len(prompts.begins)
    rows = max(QUERIES, group)
    attention[heads.kv_count, len(q) // (rows // group) + count](
        q, keys, values, prompts.starts, prompts.begins, out, heads.size**-0.5 * LOG2_E, keys.shape[1], count,
        HEADS=heads.count, KV=heads.kv_count, SIZE=heads.size, GP=group, DP=block(heads.size, LEAST_DOT), BM=rows,
        BN=KEYS, PP=block(count, PROMPTS), PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        SETTLE=q.dtype != torch.float32 and not INTERPRETED, num_warps=8, num_stages=2,
    )  # fmt: skip
    return out
