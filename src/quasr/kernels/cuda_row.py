"""Decoding one row on Hopper and newer: products and attention in CUDA C++ (`cuda/`), all else as Triton has it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton

from quasr.errors import ResourceError
from quasr.kernels import cuda_module, triton_attention, triton_linear
from quasr.kernels.cuda_module import Shape
from quasr.kernels.triton_matvec import ADD, GATE, HEAD, PLAIN
from quasr.kernels.triton_rows import settle

if TYPE_CHECKING:
    from torch import Tensor

    from quasr.kernels.cuda_module import Function
    from quasr.kernels.matrix import Heads, Matrix, Norm
    from quasr.kernels.state import Places

FIRST_CAPABILITY = (9, 0)
"""CUDA compute capability of Hopper, the first with bulk copies and dependent launch."""
PROGRAM_BYTES = 227 << 10
"""Shared memory of a program, which the rings below are cut from. Not all that is newer has it: Blackwell for desktops
has 99 KB."""
COLUMNS = {16: 256, 8: 512, 4: 1024}
"""That a warp loads at once, 16 bytes a lane, by the bits of a weight."""
LOAD_BYTES = 16
"""Of a lane, and what bulk copies begin at multiples of."""
MOST_CHUNKS = {16: 8, 8: 4, 4: 2}
"""Such loads of a row: what meets them, 64 numbers a lane, stays in registers."""
LANE_CODES = 32
"""Of 4 bits, which share a scale."""
WARP_GROUPS = {1: 8, 2: 4, 3: 4}
"""Groups of warps, by the parts of a row of W, which are a warp each."""
RING_BYTES = {PLAIN: 100 << 10, ADD: 100 << 10, GATE: 160 << 10, HEAD: 190 << 10}
"""Shared memory for weights on their way, of a multiprocessor's 227 KB: what the next kernel finds free it fills early.
By a sweep on an H200, as is LOW_RING_BYTES for 4 bits, which hardly need it."""
LOW_RING_BYTES = 64 << 10
LEAST_BUSY = 0.9
"""Of the multiprocessors: where fewer have a tile, smaller tiles are taken."""
MOST_STAGES, MOST_ROWS, ALIGNMENT = 8, 128, 128
"""As in row_product.cu."""
SIZE, PARTS, ATTENTION_THREADS = 128, 8, 256
"""As in row_attention.cu."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program takes of W at a time. slices: parts of a row of W; rows: of W, that a warp takes."""

    bits: int
    columns: int
    group: int
    mode: int
    slices: int
    rows: int

    @property
    def warps(self) -> int:
        """That multiply; one more fetches."""
        return self.slices * WARP_GROUPS[self.slices]

    @property
    def height(self) -> int:
        """Rows of W."""
        return WARP_GROUPS[self.slices] * self.rows

    @property
    def outputs(self) -> int:
        return self.height // 2 if self.mode == GATE else self.height

    @property
    def scale_bytes(self) -> int:
        """Scales that come with the codes: of groups, or of the head's rows."""
        if self.bits == 4:
            return self.height * self.columns // self.group * 2
        return self.height * 2 if self.bits == 8 and self.mode == HEAD else 0

    @property
    def bytes(self) -> int:
        """Of a stage of the ring."""
        return self.height * self.columns * self.bits // 8 + triton.cdiv(self.scale_bytes, ALIGNMENT) * ALIGNMENT

    @property
    def macros(self) -> tuple[tuple[str, int], ...]:
        """For row_product.cu."""
        chunks = self.columns // (self.slices * COLUMNS[self.bits])
        return (
            ("BITS", self.bits), ("SLICES", self.slices), ("CHUNKS", chunks), ("GROUPS", WARP_GROUPS[self.slices]),
            ("ROWS", self.rows), ("MODE", self.mode), ("NORM", int(self.mode != ADD)), ("GROUP", self.group),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RowPlan:
    """How one row meets a matrix: in what tiles, by how many programs, in a ring of how many tiles."""

    tile: Tile
    programs: int
    stages: int

    @property
    def shape(self) -> Shape:
        return Shape((self.programs, 1), self.tile.warps * 32 + 32, self.stages * self.tile.bytes)


def lack(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run, in one line, or None."""
    if device.type != "cuda":
        return f"they need a CUDA device, and this is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        return f"they need compute capability {FIRST_CAPABILITY}, and this GPU has {capability}"
    if dtype == torch.float32:
        return "they compute in 16 bits, and this is fp32"
    if cuda_module.version() is None:
        return "NVRTC, which compiles them, is not installed"
    try:
        memory = cuda_module.shared_memory(cuda_module.index(device))
        if memory < PROGRAM_BYTES:
            return f"they need {PROGRAM_BYTES >> 10} KB of shared memory a program, and this GPU has {memory >> 10} KB"
        _attention(cuda_module.index(device), 2, dtype == torch.float16)
    except (RuntimeError, ResourceError) as error:
        return f"one does not compile or load: {str(error).splitlines()[0]}"
    return None


def linear(x: Tensor, matrix: Matrix, norm: Norm | None = None) -> Tensor:
    """See `reference.linear`."""
    plan = _plan(x, matrix, PLAIN, norm)
    if plan is None:
        return triton_linear.linear(x, matrix, norm)
    out = torch.empty(1, matrix.rows, dtype=matrix.dtype, device=x.device)
    _launch(plan, x, matrix, norm, (out, None, None, None), matrix.rows)
    return out


def add_linear(x: Tensor, matrix: Matrix, residual: Tensor) -> None:
    """See `reference.add_linear`."""
    plan = _plan(x, matrix, ADD, None)
    if plan is None:
        triton_linear.add_linear(x, matrix, residual)
    else:
        _launch(plan, x, matrix, None, (residual, None, None, None), matrix.rows)


def gated_linear(x: Tensor, matrix: Matrix, norm: Norm | None = None) -> Tensor:
    """See `reference.gated_linear`."""
    plan = _plan(x, matrix, GATE, norm)
    if plan is None:
        return triton_linear.gated_linear(x, matrix, norm)
    out = torch.empty(1, matrix.rows // 2, dtype=matrix.dtype, device=x.device)
    _launch(plan, x, matrix, norm, (out, None, None, None), matrix.rows // 2)
    return out


def choose(x: Tensor, norm: Norm, head: Matrix) -> tuple[Tensor, Tensor]:
    """See `reference.choose`."""
    plan = _plan(x, head, HEAD, norm)
    if plan is None:
        return triton_linear.choose(x, norm, head)
    shape = (1, plan.programs * plan.tile.warps)
    largest, totals = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    places = torch.empty(shape, dtype=torch.int32, device=x.device)
    _launch(plan, x, head, norm, (None, largest, places, totals), head.rows)
    return settle(largest, places, totals)


def attend_step(x: Tensor, keys: Tensor, values: Tensor, places: Places, heads: Heads) -> Tensor:
    """See `reference.attend_step`."""
    if not attends(len(x), heads) or not _as_read((x, keys, values), heads):
        return triton_attention.attend_step(x, keys, values, places, heads)
    out = x.new_empty(1, heads.query_width)
    group = heads.count // heads.kv_count
    scale = heads.size**-0.5 * triton_attention.LOG2_E
    _attention(cuda_module.index(x.device), group, x.dtype == torch.float16).launch(
        Shape((heads.kv_count, PARTS), ATTENTION_THREADS),
        (
            x, keys, values, places.offsets, places.lengths, places.idle, heads.q_norm.weight, heads.k_norm.weight,
            heads.rates, out, keys.shape[1], heads.q_norm.eps, heads.k_norm.eps, scale,
        ),
    )  # fmt: skip
    return out


def attends(rows: int, heads: Heads) -> bool:
    """Whether row_attention.cu takes these rows and heads."""
    return rows == 1 and heads.size == SIZE and heads.count in (heads.kv_count, 2 * heads.kv_count, 4 * heads.kv_count)


def _as_read(tensors: tuple[Tensor, ...], heads: Heads) -> bool:
    """Whether x, keys, values and the norms have one dtype of 16 bits, and begin where 16 bytes are read at a time."""
    norms = heads.q_norm.weight, heads.k_norm.weight
    one = {tensor.dtype for tensor in (*tensors, *norms)}
    return len(one) == 1 and torch.float32 not in one and _aligned(*tensors, *norms)


def _aligned(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.data_ptr() % LOAD_BYTES == 0 for tensor in tensors)


def _plan(x: Tensor, matrix: Matrix, mode: int, norm: Norm | None) -> RowPlan | None:
    """None where Triton multiplies: several rows, fp32, a norm in another dtype, what begins between the places where
    16 bytes are read at a time, or a matrix that no plan fits."""
    given = torch.float32 if norm is not None else matrix.dtype
    if len(x) != 1 or matrix.dtype == torch.float32 or x.dtype != given or (mode != ADD) != (norm is not None):
        return None
    weight = None if norm is None else norm.weight
    if (weight is not None and weight.dtype != matrix.dtype) or not _aligned(x, matrix.weight, matrix.scale, weight):
        return None
    rows = matrix.rows // 2 if mode == GATE else matrix.rows
    return plan_of(rows, matrix.columns, matrix.bits, matrix.group, mode, _processors(cuda_module.index(x.device)))


@cache
def plan_of(rows: int, columns: int, bits: int, group: int, mode: int, processors: int) -> RowPlan | None:
    """The plan for weights (rows, columns), or (2 rows, columns) with GATE; None where none fits.

    group: columns that share a scale.
    """
    alone = group == columns or bits == 16
    if columns % COLUMNS[bits] or (bits == 4 and (group % LANE_CODES or mode == HEAD)) or (bits == 8 and not alone):
        return None
    loads = columns // COLUMNS[bits]
    slices = next((n for n in WARP_GROUPS if loads % n == 0 and loads // n <= MOST_CHUNKS[bits]), None)
    if slices is None or (mode == HEAD and slices > 1):  # each warp takes the best of whole logits
        return None
    heights = (1,) if bits == 16 else (2, 1)
    found = (_planned(rows, Tile(bits, columns, group, mode, slices, height), processors) for height in heights)
    return next((plan for plan in found if plan is not None), None)


def _planned(rows: int, tile: Tile, processors: int) -> RowPlan | None:
    """None where the tile does not divide the rows, leaves too many processors idle, or does not fit."""
    tiles, rest = divmod(rows, tile.outputs)
    if rest or (tile.rows > 1 and tiles < LEAST_BUSY * processors):
        return None
    each = triton.cdiv(tiles, processors)
    ring = LOW_RING_BYTES if tile.bits == 4 else RING_BYTES[tile.mode]
    stages = min(MOST_STAGES, each, ring // tile.bytes)
    copies = tile.scale_bytes // (2 if tile.mode == GATE else 1)
    if stages < min(each, 2) or copies % 16 or (tile.mode != HEAD and each * tile.height > MOST_ROWS):
        return None
    return RowPlan(tile, triton.cdiv(tiles, each), stages)


def _launch(
    plan: RowPlan, x: Tensor, matrix: Matrix, norm: Norm | None, out: tuple[Tensor | None, ...], n: int
) -> None:
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    kernel = _product(cuda_module.index(x.device), plan, matrix.dtype == torch.float16)
    kernel.launch(plan.shape, (x, matrix.weight, matrix.scale, weight, *out, n, eps, plan.stages))


@cache
def _product(device: int, plan: RowPlan, half: bool) -> Function:
    macros = dict(plan.tile.macros, TYPE_IS_HALF=int(half))
    return cuda_module.function(device, "row_product.cu", "row_product", plan.shape.shared, **macros)


@cache
def _attention(device: int, group: int, half: bool) -> Function:
    return cuda_module.function(device, "row_attention.cu", "row_attention", 0, GROUP=group, TYPE_IS_HALF=int(half))


@cache
def _processors(device: int) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
