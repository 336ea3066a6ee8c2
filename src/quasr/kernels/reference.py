"""Every operation in plain torch: the specification that the other kernels are tested against, and the CPU's path.

m is the number of rows that are computed together. The residual stream is fp32, whatever the weights are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from quasr.kernels.matrix import Heads, Matrix, Norm
    from quasr.kernels.state import DecodeState, Places, Prompts

HEAD_NUMBERS = 1 << 25
"""Weights of the head that are dequantised at once."""


def dequantise(matrix: Matrix) -> Tensor:
    """(rows, columns) in the matrix's dtype: code * scale."""
    if matrix.scale is None:
        return matrix.weight
    codes = matrix.weight
    if matrix.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).to(torch.int8) - 8
    groups = codes.to(matrix.dtype).unflatten(1, (-1, matrix.group))
    return (groups * matrix.scale[..., None]).flatten(1)


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """(..., size) -> the same in the norm's dtype: x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    return norm.weight * wide.to(norm.weight.dtype)


def add_rms_norm(x: Tensor, y: Tensor | None, norm: Norm) -> Tensor:
    """x (m, k) fp32 += y (m, k), in place, where there is a y; `rms_norm` of it."""
    if y is not None:
        x += y
    return rms_norm(x, norm)


def linear(x: Tensor, matrix: Matrix, norm: Norm | None = None) -> Tensor:
    """(m, k) -> (m, n) in the matrix's dtype: norm(x) W^T."""
    normed = x if norm is None else rms_norm(x, norm)
    return F.linear(normed.to(matrix.dtype), dequantise(matrix))


def add_linear(x: Tensor, matrix: Matrix, residual: Tensor) -> None:
    """residual (m, n) fp32 += x (m, k) W^T, in place."""
    residual += linear(x, matrix)


def sums_apart(matrix: Matrix, m: int) -> bool:
    """Whether `add_linear` of m rows is a product and then a sum, so that the sum may as well be made elsewhere."""
    return False


def gated_linear(x: Tensor, matrix: Matrix, norm: Norm | None = None) -> Tensor:
    """(m, k) -> (m, n / 2): silu(gate) * up, where gate and up are the halves of norm(x) W^T (Shazeer 2020)."""
    gate, up = linear(x, matrix, norm).chunk(2, dim=-1)
    return F.silu(gate) * up


def embed(tokens: Tensor, table: Matrix) -> Tensor:
    """(m,) ids -> (m, hidden) fp32, the beginning of the residual stream. The table is in 16 bits or int8."""
    rows = table.weight[tokens]
    return rows.float() if table.scale is None else (rows.to(table.dtype) * table.scale[tokens]).float()


def rotate_write(qkv: Tensor, keys: Tensor, values: Tensor, places: Places, heads: Heads) -> Tensor:
    """(m, heads.width) -> normed and rotated queries (m, heads.query_width); k and v go into the cache.

    keys, values: (kv_heads, positions, head_dim). Rows of `places.idle` write nothing; no two others may share a place.
    """
    split = qkv.unflatten(-1, (-1, heads.size))
    q, k, v = split.split([heads.count, heads.kv_count, heads.kv_count], dim=1)
    angles = places.lengths[:, None].float() * heads.rates
    _write(keys, _rotate(rms_norm(k, heads.k_norm), angles), places)
    _write(values, v, places)
    return _rotate(rms_norm(q, heads.q_norm), angles).flatten(1)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE (Su et al. 2021, half-split layout) on (m, heads, size) by (m, size / 2), in fp32; returns x's dtype."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


def _write(cache: Tensor, rows: Tensor, places: Places) -> None:
    """(m, kv_heads, size) of the busy rows to their places in (kv_heads, positions, size)."""
    busy = ~places.idle
    where = (places.offsets + places.lengths)[busy]
    cache[:, where] = rows[busy].to(cache.dtype).transpose(0, 1)


def attend(q: Tensor, keys: Tensor, values: Tensor, places: Places, heads: Heads) -> Tensor:
    """Rotated queries (m, heads.query_width) -> attention over positions 0 to `length` of each row, its own with it.

    Idle rows get zeros. Reads the lengths on the host, so it cannot be captured in a graph.
    """
    out = torch.zeros_like(q)
    begins, ends, idle = places.offsets.tolist(), (places.offsets + places.lengths + 1).tolist(), places.idle.tolist()
    for row in (row for row in range(len(q)) if not idle[row]):
        seen = slice(begins[row], ends[row])
        # The query heads that share a key head stand where tokens would.
        grouped = q[row].view(heads.kv_count, -1, heads.size)
        out[row] = F.scaled_dot_product_attention(grouped, keys[:, seen], values[:, seen]).flatten()
    return out


def attend_prompts(q: Tensor, keys: Tensor, values: Tensor, prompts: Prompts, heads: Heads) -> Tensor:
    """Rotated queries (tokens of all prompts, heads.query_width) -> causal attention inside each prompt.

    keys, values: (kv_heads, positions, head_dim), which hold those of the prompts. Goes by what the host knows of them,
    so it cannot be captured in a graph: raises ValueError where that is nothing.
    """
    if not prompts.lengths:
        raise ValueError("the host does not know these prompts' lengths")
    out = torch.empty_like(q)
    end = 0
    for length, offset in zip(prompts.lengths, prompts.offsets, strict=True):
        own, seen = slice(end, end + length), slice(offset, offset + length)
        end += length
        part = q[own].unflatten(1, (heads.count, -1)).transpose(0, 1)[None]
        k, v = keys[None, :, seen], values[None, :, seen]
        y = F.scaled_dot_product_attention(part, k, v, is_causal=True, enable_gqa=True)
        out[own] = y[0].transpose(0, 1).flatten(1)
    return out


def attend_step(qkv: Tensor, keys: Tensor, values: Tensor, places: Places, heads: Heads) -> Tensor:
    """One token a row: `rotate_write`, then `attend`. (m, heads.width) -> (m, heads.query_width)."""
    return attend(rotate_write(qkv, keys, values, places, heads), keys, values, places, heads)


def choose(x: Tensor, norm: Norm, head: Matrix) -> tuple[Tensor, Tensor]:
    """(m, hidden) -> the likeliest token (m,) int64 and log softmax of it (m,) fp32. Of equals the first one wins.

    A row of NaN gets a log-probability of NaN.
    """
    normed = rms_norm(x, norm)
    parts = [linear(normed, part) for part in _row_blocks(head, max(1, HEAD_NUMBERS // head.columns))]
    wide = torch.cat(parts, dim=-1).float()
    best, tokens = wide.max(dim=-1)
    return tokens, best - wide.logsumexp(dim=-1)


def _row_blocks(matrix: Matrix, size: int) -> Iterator[Matrix]:
    """Views of at most `size` rows each."""
    for start in range(0, matrix.rows, size):
        rows = slice(start, start + size)
        scale = None if matrix.scale is None else matrix.scale[rows]
        yield replace(matrix, weight=matrix.weight[rows], scale=scale)


def advance(state: DecodeState, tokens: Tensor, logprobs: Tensor) -> None:
    """Takes the tokens (m,) that were computed from `state.tokens`, in place; finished rows stay as they are.

    A stop token ends a row and is not recorded; the token that fills the budget is recorded and ends it.
    """
    busy = ~state.finished
    stopped = torch.isin(tokens, state.stop_ids)
    taken = busy & ~stopped
    last = (state.cursor.clamp(max=state.history.shape[1] - 1))[:, None]
    for store, new in ((state.history, tokens), (state.logprobs, logprobs)):
        store.scatter_(1, last, torch.where(taken[:, None], new[:, None], store.gather(1, last)))
    state.lengths.add_(busy)
    state.cursor.add_(taken)
    state.tokens.copy_(torch.where(taken, tokens, state.tokens))
    state.finished.logical_or_(busy & (stopped | (state.cursor >= state.limits)))
