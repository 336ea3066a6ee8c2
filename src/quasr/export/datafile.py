"""The external data of one graph: tensors one after the other in a file, written as they come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

PAGE = 4096
"""Large tensors begin on a page, so that ONNX Runtime and numpy can map them."""

LARGE = 1 << 20
"""Bytes of a large tensor: gaps before smaller ones would be a hundredth of the bundled model."""

LINE = 64
"""Small ones on a cache line."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One tensor: where it lies, and as what."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class DataFile:
    """Appends tensors to `path`. Little-endian, as ONNX wants."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")

    def add(self, array: NDArray[Any]) -> Placed:
        """Writes one tensor."""
        return self.stream(array.shape, array.dtype, [array])

    def stream(self, shape: tuple[int, ...], dtype: np.dtype[Any], pieces: Iterable[NDArray[Any]]) -> Placed:
        """Writes the tensor that `pieces` make up in order."""
        stored = Placed(self.path.name, self._align(math.prod(shape) * dtype.itemsize), shape, dtype)
        for piece in pieces:
            self._file.write(np.ascontiguousarray(piece, dtype.newbyteorder("<")).data)
        if self._file.tell() != stored.offset + stored.bytes:
            raise ValueError(f"the pieces do not make up a tensor of shape {shape}")
        return stored

    def _align(self, size: int) -> int:
        step = PAGE if size >= LARGE else LINE
        self._file.write(bytes(-self._file.tell() % step))
        return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
