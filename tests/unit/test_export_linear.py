"""Matrices in the data file against the layout that ONNX Runtime documents, decoded here by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from quant_samples import linear
from torch import nn

from quasr.errors import OptionError
from quasr.export.datafile import LARGE, LINE, PAGE, DataFile
from quasr.export.linear import FLOAT, ROWS, Format, fitting_group, write_linear
from quasr.quant.linear import Int4Linear, Int8Linear
from quasr.quant.scheme import parse

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from quasr.export.datafile import Placed
    from quasr.export.linear import Layer, Linear

torch.set_num_threads(1)


def read(path: Path, placed: Placed | None) -> NDArray[np.float32]:
    assert placed is not None
    return np.fromfile(path, placed.dtype, int(np.prod(placed.shape)), offset=placed.offset).reshape(placed.shape)


def decoded(path: Path, found: Linear) -> NDArray[np.float32]:
    """The (rows, columns) matrix that a runtime sees."""
    weight, form = read(path, found.weight), found.format
    if form == FLOAT:
        return weight
    scale = read(path, found.scale)
    if form == ROWS:
        return (weight.astype(np.float32) * scale).T
    if form.bits == 4:
        weight = np.stack([weight & 15, weight >> 4], axis=-1).reshape(found.rows, -1, form.group)
    zero = 1 << (form.bits - 1)
    return ((weight.astype(np.float32) - zero) * scale[:, :, None]).reshape(found.rows, -1)


def written(path: Path, layers: list[Layer], form: Format) -> Linear:
    with DataFile(path) as file:
        file.add(np.ones(3, dtype=np.uint8))
        return write_linear(file, layers, form)


@pytest.mark.parametrize(
    ("form", "limit"),
    [(FLOAT, 0), (ROWS, 0.5 / 127), (Format(8, 32), 0.5 / 127), (Format(4, 64), 0.25)],
    ids=["fp32", "rows", "8 bits", "4 bits"],
)
def test_rounding_stays_within_half_a_step(form: Format, limit: float, tmp_path: Path) -> None:
    layer = linear(torch.bfloat16)
    found = written(tmp_path / "data", [layer], form)
    truth = layer.weight.float().numpy()
    size = form.group or truth.shape[1]
    largest = np.abs(truth.reshape(len(truth), -1, size)).max(-1, keepdims=True).repeat(size, -1).reshape(truth.shape)
    assert (np.abs(decoded(tmp_path / "data", found) - truth) <= limit * largest * 1.001).all()
    np.testing.assert_array_equal(read(tmp_path / "data", found.bias), layer.bias.float().numpy())


@pytest.mark.parametrize(
    ("scheme", "form"),
    [("int8", ROWS), ("int8", Format(8, 64)), ("int8-g32", Format(8, 32)), ("int4-g64", Format(4, 64))],
    ids=["rows", "rows in groups", "8 bits", "4 bits"],
)
def test_codes_that_are_there_stay(scheme: str, form: Format, tmp_path: Path) -> None:
    kind = Int8Linear if scheme.startswith("int8") else Int4Linear
    layer = kind.from_linear(linear(), parse(scheme))
    for wanted in (form, FLOAT):
        found = written(tmp_path / "data", [layer], wanted)
        np.testing.assert_array_equal(decoded(tmp_path / "data", found), layer.dequantize().numpy())


def test_large_tensors_begin_on_a_page(tmp_path: Path) -> None:
    with DataFile(tmp_path / "data") as file:
        places = [file.add(np.ones(size, dtype=np.uint8)).offset for size in (3, LARGE - 1, LARGE)]
    assert places == [0, LINE, LINE + LARGE - 1 + (-LINE - LARGE + 1) % PAGE]


def test_joined_layers_stand_one_below_the_other(tmp_path: Path) -> None:
    layers = [linear(rows=64), linear(rows=32)]
    found = written(tmp_path / "data", [*layers], FLOAT)
    assert (found.rows, found.columns, found.weight.offset % LINE) == (96, 256, 0)
    np.testing.assert_array_equal(decoded(tmp_path / "data", found), torch.cat([x.weight for x in layers]).numpy())
    np.testing.assert_array_equal(read(tmp_path / "data", found.bias), torch.cat([x.bias for x in layers]).numpy())


def test_a_convolution_lies_with_its_channels_last(tmp_path: Path) -> None:
    layer = nn.Conv2d(2, 5, 3).requires_grad_(False)
    found = decoded(tmp_path / "data", written(tmp_path / "data", [layer], ROWS))
    truth = layer.weight.numpy()
    assert np.abs(found.reshape(5, 3, 3, 2)[:, 2, 0, 1] - truth[:, 1, 2, 0]).max() < 0.01
    np.testing.assert_array_equal(
        decoded(tmp_path / "data", written(tmp_path / "data", [layer], FLOAT)), truth.reshape(5, -1)
    )


def test_the_group_is_the_asked_one_or_the_largest() -> None:
    assert [fitting_group("x", columns, None) for columns in (1024, 192, 96, 48)] == [128, 64, 32, 16]
    assert fitting_group("x", 1024, 32) == 32
    with pytest.raises(OptionError, match="x has 96 input features, which groups of 64 do not divide: take --group 32"):
        fitting_group("x", 96, 64)
    with pytest.raises(OptionError, match="no multiple of 16"):
        fitting_group("x", 40, None)


def test_pieces_must_make_up_the_tensor(tmp_path: Path) -> None:
    with DataFile(tmp_path / "data") as file, pytest.raises(ValueError, match="do not make up"):
        file.stream((3, 2), np.dtype(np.float32), [np.zeros(4, dtype=np.float32)])
