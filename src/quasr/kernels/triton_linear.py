"""Products of any number of rows: which kernel takes them, and what is launched."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from quasr.kernels import reference, triton_matvec, triton_product
from quasr.kernels.matrix import Matrix
from quasr.kernels.triton_launch import (
    INTERPRETED,
    WARP_GROUP,
    block,
    launch_options,
    pdl_works,
    program_memory,
    tensor_cores,
)
from quasr.kernels.triton_matvec import ADD, GATE, HEAD, PLAIN
from quasr.kernels.triton_rows import rms_norm, settle, silu_gate

if TYPE_CHECKING:
    from torch import Tensor

    from quasr.kernels.matrix import Norm

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

MATVEC_ROWS = 4
"""Most rows that `triton_matvec` takes, and only one where the tensor cores take the others."""
PRODUCT_ROWS = 256
"""Most rows for which codes are turned into numbers in the tile; above, once, for a product of torch."""
FLOAT_ROWS = 64
"""The same for weights in 16 bits, which need no turning."""
GATE_PARTS = 2
"""Of gate and up together, those that torch multiplies by at once where they are codes: with 1, 47 MB more for four
clips of 30 s of the 1.7B model."""
COUNTERS = 1024
"""Far more than the programs that a plan aims at, which bound the tiles that are cut into parts."""


def linear(x: Tensor, matrix: Matrix, norm: Norm | None = None) -> Tensor:
    """See `reference.linear`."""
    if route(matrix, len(x)) == "torch":
        return F.linear(x if norm is None else rms_norm(x, norm), dequantise(matrix))
    out = torch.empty(len(x), matrix.rows, dtype=matrix.dtype, device=x.device)
    _launch(x, matrix, norm, (out,), PLAIN)
    return out


def add_linear(x: Tensor, matrix: Matrix, residual: Tensor) -> None:
    """See `reference.add_linear`."""
    if route(matrix, len(x)) == "torch":
        residual += F.linear(x, dequantise(matrix))
    else:
        _launch(x, matrix, None, (residual,), ADD)


def sums_apart(matrix: Matrix, m: int) -> bool:
    """See `reference.sums_apart`: torch's products add nothing."""
    return route(matrix, m) == "torch"


def gated_linear(x: Tensor, matrix: Matrix, norm: Norm | None = None) -> Tensor:
    """See `reference.gated_linear`."""
    if route(matrix, len(x)) == "torch":
        return _gated_by_torch(x if norm is None else rms_norm(x, norm), matrix)
    out = torch.empty(len(x), matrix.rows // 2, dtype=matrix.dtype, device=x.device)
    _launch(x, matrix, norm, (out,), GATE)
    return out


def _gated_by_torch(x: Tensor, matrix: Matrix) -> Tensor:
    """Of quantised weights some of gate and the same of up are numbers at a time: for the memory of those, which are
    the largest of a layer, and of their products."""
    n = matrix.rows // 2
    out = torch.empty(len(x), n, dtype=matrix.dtype, device=x.device)
    if matrix.scale is None:
        silu_gate(F.linear(x, matrix.weight), out)
        return out
    size = triton.cdiv(n, GATE_PARTS)
    numbers = torch.empty(2 * size, matrix.columns, dtype=matrix.dtype, device=x.device)
    for begin in range(0, n, size):
        count = min(size, n - begin)
        for half, first in enumerate((begin, n + begin)):
            _dequantise(_rows(matrix, first, count), numbers[half * count :][:count])
        silu_gate(F.linear(x, numbers[: 2 * count]), out[:, begin:][:, :count])
    return out


def _rows(matrix: Matrix, first: int, count: int) -> Matrix:
    """Some of the rows of a quantised matrix."""
    assert matrix.scale is not None
    return Matrix(matrix.weight[first:][:count], matrix.scale[first:][:count])


def choose(x: Tensor, norm: Norm, head: Matrix) -> tuple[Tensor, Tensor]:
    """See `reference.choose`. The logits stay in registers: only each block's maximum and sum are written."""
    if len(x) > MATVEC_ROWS and not tensor_cores(x.device):
        return reference.choose(x, norm, head)
    found = [_head(part, norm, head) for part in x.split(PRODUCT_ROWS)]
    return found[0] if len(found) == 1 else (torch.cat([a for a, _ in found]), torch.cat([b for _, b in found]))


def route(matrix: Matrix, m: int) -> str:
    """`matvec`, `product` or `torch`: which kernel multiplies m rows by this matrix."""
    if _by_matvec(matrix, m):
        return "matvec"
    if m <= MATVEC_ROWS:
        return "product"
    most = PRODUCT_ROWS if matrix.bits < 16 else FLOAT_ROWS * (matrix.dtype != torch.float32)
    return "product" if m <= most and tensor_cores(matrix.weight.device) else "torch"


def _by_matvec(matrix: Matrix, m: int) -> bool:
    alone = matrix.dtype != torch.float32 and tensor_cores(matrix.weight.device)
    return m <= (1 if alone else MATVEC_ROWS) and triton_matvec.fits(matrix)


def dequantise(matrix: Matrix) -> Tensor:
    """See `reference.dequantise`."""
    if matrix.scale is None:
        return matrix.weight
    out = torch.empty(matrix.rows, matrix.columns, dtype=matrix.dtype, device=matrix.weight.device)
    _dequantise(matrix, out)
    return out


def _dequantise(matrix: Matrix, out: Tensor) -> None:
    triton_product.dequantisation[triton.cdiv(matrix.rows, 16), triton.cdiv(matrix.columns, 256)](
        matrix.weight, matrix.scale, out, matrix.rows, matrix.columns,
        BITS=matrix.bits, GROUP=matrix.group, BN=16, BK=256, TYPE=TYPES[matrix.dtype],
    )  # fmt: skip


def _head(x: Tensor, norm: Norm, head: Matrix) -> tuple[Tensor, Tensor]:
    rows = _rows_a_program(head, len(x))
    shape = (len(x), triton.cdiv(head.rows, rows))
    best, totals = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    places = torch.empty(shape, dtype=torch.int32, device=x.device)
    _launch(x, head, norm, (best, places, totals), HEAD)
    return settle(best, places, totals)


def _rows_a_program(matrix: Matrix, m: int) -> int:
    """Rows of the head that share a maximum."""
    if _by_matvec(matrix, m):
        return triton_matvec.plan(matrix, HEAD).block_rows
    return _product_plan(matrix, m, HEAD).rows


def _launch(x: Tensor, matrix: Matrix, norm: Norm | None, out: tuple[Tensor, ...], mode: int) -> None:
    if _by_matvec(matrix, len(x)):
        _launch_matvec(x, matrix, norm, out, mode)
    else:
        _launch_product(x if norm is None else rms_norm(x, norm), matrix, out, mode)


def _outputs(matrix: Matrix, mode: int) -> int:
    return matrix.rows // 2 if mode == GATE else matrix.rows


def _group(matrix: Matrix) -> int:
    """Columns that share a scale, where a row has several; else 0."""
    return 0 if matrix.group == matrix.columns else matrix.group


def _launch_matvec(x: Tensor, matrix: Matrix, norm: Norm | None, out: tuple[Tensor, ...], mode: int) -> None:
    chosen = triton_matvec.plan(matrix, mode)
    n, k = _outputs(matrix, mode), matrix.columns
    group = triton_matvec.group_of(matrix)
    pdl = pdl_works(x.device)
    triton_matvec.matvec[triton.cdiv(n, chosen.block_rows),](
        x, matrix.weight, matrix.weight if matrix.scale is None else matrix.scale,
        matrix.weight if norm is None else norm.weight, out[0], out[-2 if len(out) > 1 else 0], out[-1],
        len(x), n, k, 0.0 if norm is None else norm.eps,
        BITS=matrix.bits, GROUP=group, SCALED=matrix.scale is not None and group == 0, NORM=norm is not None, MODE=mode,
        M=block(len(x)), BN=chosen.block_rows, BK=chosen.block_columns, CHUNKS=triton.cdiv(k, chosen.block_columns),
        EVEN=k % chosen.block_columns == 0 and n % chosen.block_rows == 0, PDL=pdl,
        **launch_options(chosen.warps, pdl),
    )  # fmt: skip


def _launch_product(x: Tensor, matrix: Matrix, out: tuple[Tensor, ...], mode: int) -> None:
    chosen = _product_plan(matrix, len(x), mode)
    per = 2 if matrix.bits == 4 else 1
    n, units, step = _outputs(matrix, mode), matrix.columns // per, chosen.columns // per
    group = _group(matrix)
    pdl, packed = pdl_works(x.device), _packed(matrix)
    tiles = triton.cdiv(matrix.rows, chosen.rows), triton.cdiv(len(x), chosen.lines)
    steps = triton.cdiv(triton.cdiv(units, step), chosen.splits)
    parts = torch.empty(
        tiles[0] * tiles[1] * chosen.splits * chosen.lines * chosen.rows if chosen.splits > 1 else 1,
        dtype=torch.float32, device=x.device,
    )  # fmt: skip
    triton_product.product[*tiles, chosen.splits](
        _in_pairs(x.to(matrix.dtype)) if per == 2 else x.to(matrix.dtype),
        matrix.weight, matrix.weight if matrix.scale is None else matrix.scale,
        out[0], out[-2 if len(out) > 1 else 0], out[-1], parts, _counters(x.device),
        len(x), n, units, steps,
        BITS=matrix.bits, GROUP=group // per, SCALED=matrix.scale is not None and group == 0, MODE=mode,
        SPLITS=chosen.splits, BM=chosen.lines, BN=chosen.rows, BK=step, TYPE=TYPES[matrix.dtype],
        PRECISION="ieee" if matrix.dtype == torch.float32 else "tf32", EVEN=units % step == 0,
        PACKED=packed, SETTLE=packed and chosen.warps % WARP_GROUP == 0,
        PDL=pdl, AHEAD=triton_product.AHEAD[matrix.bits],
        **launch_options(chosen.warps, pdl, chosen.stages),
    )  # fmt: skip


def _product_plan(matrix: Matrix, m: int, mode: int) -> triton_product.ProductPlan:
    memory = program_memory(matrix.weight.device)
    return triton_product.plan(matrix, m, memory, gate=mode == GATE, head=mode == HEAD)


def _in_pairs(x: Tensor) -> Tensor:
    """(m, k) as integers of twice the width, (m, k / 2)."""
    return x.contiguous().view(torch.int64 if x.dtype == torch.float32 else torch.int32)


def _packed(matrix: Matrix) -> bool:
    """Whether codes are turned into numbers four at a time, by instructions that start with Ampere."""
    on_gpu = not INTERPRETED and tensor_cores(matrix.weight.device)
    return on_gpu and matrix.bits < 16 and matrix.dtype != torch.float32


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros, which every launch leaves as zeros: one for each tile that is cut into parts."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
