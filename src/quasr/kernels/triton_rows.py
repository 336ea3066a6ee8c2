"""Kernels of one program a row: RMSNorm, the embedding, the end of the head, and the step of the decoding state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from quasr.kernels.triton_launch import block, gdc_launch, gdc_wait, launch_options, pdl_works

if TYPE_CHECKING:
    from torch import Tensor

    from quasr.kernels.matrix import Matrix, Norm
    from quasr.kernels.state import DecodeState


@triton.jit
def normalisation(x, y, norm, out, k, eps, ADD: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
    """out (m, k) = norm * x / rms(x); with ADD, x += y first."""
    if PDL:
        gdc_wait()
        gdc_launch()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BK)
    found = tl.load(x + row * k + columns, mask=columns < k, other=0).to(tl.float32)
    if ADD:
        found += tl.load(y + row * k + columns, mask=columns < k, other=0).to(tl.float32)
        tl.store(x + row * k + columns, found, mask=columns < k)
    found *= tl.rsqrt(tl.sum(found * found, axis=0) / k + eps)
    found *= tl.load(norm + columns, mask=columns < k, other=0).to(tl.float32)
    tl.store(out + row * k + columns, found.to(out.dtype.element_ty), mask=columns < k)


@triton.jit
def gating(x, out, n, stride, BN: tl.constexpr, PDL: tl.constexpr):
    """out (m, n), `stride` apart, = silu(first half) * second half of x (m, 2 n)."""
    if PDL:
        gdc_wait()
        gdc_launch()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    gate = tl.load(x + row * 2 * n + columns, mask=columns < n, other=0).to(tl.float32)
    up = tl.load(x + row * 2 * n + n + columns, mask=columns < n, other=0).to(tl.float32)
    tl.store(out + row * stride + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=columns < n)


@triton.jit
def embedding(tokens, table, scale, out, k, SCALED: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
    """out (m, k) fp32 = table[tokens], times the scale of the row."""
    if PDL:
        gdc_wait()
        gdc_launch()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    token = tl.load(tokens + row)
    found = tl.load(table + token * k + columns, mask=columns < k, other=0).to(tl.float32)
    if SCALED:
        found *= tl.load(scale + token).to(tl.float32)
    tl.store(out + row * k + columns, found, mask=columns < k)


@triton.jit
def choice(best, places, totals, tokens, logprobs, blocks, BLOCKS: tl.constexpr, PDL: tl.constexpr):
    """Of a row's (blocks,) maxima, their places and sums of exponentials: the first largest, and its log softmax."""
    if PDL:
        gdc_wait()
        gdc_launch()
    row = tl.program_id(0).to(tl.int64) * blocks
    lanes = tl.arange(0, BLOCKS)
    top = tl.full((BLOCKS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCKS,), tl.float32)
    place = tl.full((BLOCKS,), 2147483647, tl.int32)
    for start in range(0, blocks, BLOCKS):
        inside = start + lanes < blocks
        new = tl.load(best + row + start + lanes, mask=inside, other=float("-inf"))
        raised = tl.maximum(top, new)
        safe = tl.where(raised == float("-inf"), 0.0, raised)
        sums = tl.load(totals + row + start + lanes, mask=inside, other=0)
        total = total * tl.exp(top - safe) + sums * tl.exp(new - safe)
        where = tl.load(places + row + start + lanes, mask=inside, other=2147483647)
        place = tl.where(new > top, where, place)
        top = raised
    largest = tl.max(top, axis=0)
    found = tl.min(tl.where(top == largest, place, 2147483647), axis=0)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(tokens + tl.program_id(0), tl.where(found == 2147483647, 0, found).to(tl.int64))
    tl.store(logprobs + tl.program_id(0), -tl.log(tl.sum(total * tl.exp(top - safe), axis=0)))


@triton.jit
def advancement(
    new, new_logprobs, tokens, lengths, limits, finished, stop_ids, history, logprobs, cursor, capacity, stops,
    STOPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of `reference.advance`."""
    if PDL:
        gdc_wait()
        gdc_launch()
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(new + row)
    if tl.load(finished + row) == 0:
        lanes = tl.arange(0, STOPS)
        known = tl.load(stop_ids + lanes, mask=lanes < stops, other=-1)
        stopped = tl.sum((known == token).to(tl.int32), axis=0) > 0
        place = tl.load(cursor + row)
        limit = tl.load(limits + row)
        tl.store(lengths + row, tl.load(lengths + row) + 1)
        if stopped:
            tl.store(finished + row, 1)
        else:
            tl.store(tokens + row, token)
            tl.store(history + row * capacity + place, token)
            tl.store(logprobs + row * capacity + place, tl.load(new_logprobs + row))
            tl.store(cursor + row, place + 1)
            tl.store(finished + row, (place + 1 >= limit).to(tl.int8))


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """See `reference.rms_norm`, for (m, k)."""
    return add_rms_norm(x, None, norm)


def add_rms_norm(x: Tensor, y: Tensor | None, norm: Norm) -> Tensor:
    """See `reference.add_rms_norm`."""
    out = torch.empty(x.shape, dtype=norm.weight.dtype, device=x.device)
    pdl = pdl_works(x.device)
    normalisation[len(x),](
        x, x if y is None else y, norm.weight, out, x.shape[1], norm.eps,
        ADD=y is not None, BK=block(x.shape[1]), PDL=pdl, **launch_options(4, pdl),
    )  # fmt: skip
    return out


def silu_gate(x: Tensor, out: Tensor) -> None:
    """(m, 2 n) -> out (m, n), some columns of a matrix: silu(first half) * second half."""
    n, pdl = x.shape[1] // 2, pdl_works(x.device)
    width = block(n, most=1024)
    gating[len(x), triton.cdiv(n, width)](x, out, n, out.stride(0), BN=width, PDL=pdl, **launch_options(4, pdl))


def embed(tokens: Tensor, table: Matrix) -> Tensor:
    """See `reference.embed`."""
    k, pdl = table.columns, pdl_works(tokens.device)
    out = torch.empty(len(tokens), k, dtype=torch.float32, device=tokens.device)
    width = block(k, most=512)
    scale = table.weight if table.scale is None else table.scale
    embedding[len(tokens), triton.cdiv(k, width)](
        tokens, table.weight, scale, out, k, SCALED=table.scale is not None, BK=width, PDL=pdl, **launch_options(4, pdl)
    )
    return out


def settle(best: Tensor, places: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """What the head left of its blocks, (m, blocks) each -> tokens (m,) int64 and log-probabilities (m,) fp32."""
    m, blocks = best.shape
    tokens = torch.empty(m, dtype=torch.int64, device=best.device)
    logprobs = torch.empty(m, dtype=torch.float32, device=best.device)
    pdl = pdl_works(best.device)
    choice[m,](
        best, places, totals, tokens, logprobs, blocks,
        BLOCKS=block(blocks, most=4096), PDL=pdl, **launch_options(8, pdl),
    )  # fmt: skip
    return tokens, logprobs


def advance(state: DecodeState, tokens: Tensor, logprobs: Tensor) -> None:
    """See `reference.advance`."""
    pdl = pdl_works(tokens.device)
    advancement[state.rows,](
        tokens, logprobs, state.tokens, state.lengths, state.limits, state.finished.view(torch.int8), state.stop_ids,
        state.history, state.logprobs, state.cursor, state.history.shape[1], len(state.stop_ids),
        STOPS=block(len(state.stop_ids)), PDL=pdl, **launch_options(1, pdl),
    )  # fmt: skip
