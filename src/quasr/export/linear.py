"""Matrices as ONNX Runtime takes them: codes and scales of MatMulNBits or of MatMulIntegerToFloat, or plain fp32.

MatMulIntegerToFloat: int8 codes (columns, rows) and a scale for every row: `quasr.quant.linear` without groups, lying
on its side.
MatMulNBits: weight[r, c] = (code[r, c] - zero) * scale[r, c // group], with zero 128 in 8 bits and 8 in 4 bits, two
codes a byte, the low one first: `quasr.quant.linear` with another zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from quasr.errors import OptionError
from quasr.export.manifest import ZERO_POINT
from quasr.quant.embedding import Int8Embedding
from quasr.quant.linear import Int4Linear, Int8Linear, pack, quantise_int4, quantise_int8, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from quasr.export.datafile import DataFile, Placed

FLOAT_BITS = 32

BLOCK_NUMBERS = 1 << 20
"""Weights that are converted at once: bounds the fp32 copies."""

BLOCKS = (128, 64, 32, 16)
"""Groups that MatMulNBits takes, the fastest first."""

Layer = nn.Linear | nn.Embedding | nn.Conv2d | Int8Linear | Int4Linear | Int8Embedding


@dataclass(frozen=True, slots=True)
class Format:
    """`bits` 32, 8 or 4; `group` columns share a scale, 0 for the whole row.

    With a scale a row, a matrix is stored on its side, (columns, rows), unless it is a `table`.
    """

    bits: int
    group: int = 0
    table: bool = False


FLOAT = Format(FLOAT_BITS)

ROWS = Format(8)
"""For MatMulIntegerToFloat; with groups it is for MatMulNBits."""

TABLE = Format(8, table=True)
"""As ROWS, but one row after the other, so that the host can look rows up."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix (rows, columns) of the data file, which may be several layers' one below the other.

    A convolution's columns are (channel, height, width) in fp32, and (height, width, channel) as ROWS.
    """

    rows: int
    columns: int
    format: Format
    weight: Placed
    scale: Placed | None
    bias: Placed | None


def fitting_group(name: str, columns: int, group: int | None) -> int:
    """`group` if it divides the columns, or for None the largest that does. Raises OptionError where none does."""
    found = next((block for block in BLOCKS if columns % block == 0), None)
    if found is None:
        raise OptionError(f"{name} has {columns} input features, no multiple of 16: export it with --weights fp32")
    if group is not None and columns % group:
        raise OptionError(
            f"{name} has {columns} input features, which groups of {group} do not divide: "
            f"take --group {found}, or leave it out"
        )
    return found if group is None else group


def write_linear(file: DataFile, layers: Sequence[Layer], form: Format) -> Linear:
    """Puts layers, which lie on the CPU, one below the other into the data file, some rows at a time."""
    rows, columns = sum(_rows(layer) for layer in layers), _columns(layers[0])
    scales: list[NDArray[Any]] = []
    pieces = _pieces(layers, form, scales)
    if form == FLOAT:
        weight = file.stream((rows, columns), np.dtype(np.float32), pieces)
    elif form == ROWS:
        weight = file.add(np.concatenate(list(pieces)).T)
        scales = [np.concatenate(scales)[:, 0]]
    elif form == TABLE:
        weight = file.stream((rows, columns), np.dtype(np.int8), pieces)
        scales = [np.concatenate(scales)[:, 0]]
    else:
        blocks, size = columns // form.group, form.group * form.bits // 8
        weight = file.stream((rows, blocks, size), np.dtype(np.uint8), pieces)
    scale = file.add(np.concatenate(scales)) if scales else None
    found = (getattr(layer, "bias", None) for layer in layers)
    biases = [bias for bias in found if isinstance(bias, Tensor)]
    bias = file.add(torch.cat(biases).float().numpy()) if biases else None
    return Linear(rows, columns, form, weight, scale, bias)


def _pieces(layers: Sequence[Layer], form: Format, scales: list[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Codes or numbers of some rows; the scales of those rows go into `scales`."""
    step = max(1, BLOCK_NUMBERS // _columns(layers[0]))
    for layer in layers:
        for start in range(0, _rows(layer), step):
            codes, scale = _encode(layer, slice(start, start + step), form)
            if scale is not None:
                scales.append(scale.numpy())
            yield codes.numpy()


def _encode(layer: Layer, rows: slice, form: Format) -> tuple[Tensor, Tensor | None]:
    if isinstance(layer, nn.Conv2d):
        weight = layer.weight.detach()[rows].float()
        return _quantise((weight if form == FLOAT else weight.permute(0, 2, 3, 1)).flatten(1), form)
    if isinstance(layer, (nn.Linear, nn.Embedding)):
        return _quantise(layer.weight.detach()[rows].float(), form)
    scale = layer.scale[rows].float()
    if form == FLOAT:
        codes = unpack(layer.weight[rows], layer.in_features) if isinstance(layer, Int4Linear) else layer.weight[rows]
        return (codes.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1), None
    if not form.group:
        return layer.weight[rows], scale
    scale = scale.repeat_interleave(_columns(layer) // form.group // scale.shape[1], dim=1)
    return (layer.weight[rows] if form.bits == 4 else _unsigned(layer.weight[rows])), scale


def _quantise(weight: Tensor, form: Format) -> tuple[Tensor, Tensor | None]:
    if form == FLOAT:
        return weight, None
    if form.bits == 8:
        codes, scale = quantise_int8(weight, form.group)
        return (_unsigned(codes) if form.group else codes), scale
    codes, scale = quantise_int4(weight, form.group)
    return pack(codes), scale


def _unsigned(codes: Tensor) -> Tensor:
    return (codes.short() + ZERO_POINT).to(torch.uint8)


def _rows(layer: Layer) -> int:
    return layer.weight.shape[0]


def _columns(layer: Layer) -> int:
    return layer.in_features if isinstance(layer, Int4Linear) else layer.weight[0].numel()
