"""The embedding of an ONNX folder: rows read out of the decoder's own data file, so that the table is held once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quasr.engine.file_map import map_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from quasr.export.manifest import EmbeddingTable


class TokenTable:
    """Looks tokens up in a memory map: only pages with tokens that are used are ever read."""

    def __init__(self, folder: Path, table: EmbeddingTable) -> None:
        self._group = table.group
        self._zero = np.float32(table.zero_point)
        self._nibbles = table.dtype == "uint4"
        mapped, (count, hidden) = map_file(folder / table.file, whole=False), table.shape
        shape = (count, hidden // 2) if self._nibbles else table.shape
        dtype = np.dtype("uint8" if self._nibbles else table.dtype)
        self._rows: NDArray[Any] = np.ndarray(shape, dtype, mapped, table.offset)
        self._scale: NDArray[np.float32] | None = (
            np.ndarray(table.scale_shape, np.float32, mapped, table.scale_offset) if table.group else None
        )

    def rows(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """(n,) tokens -> (n, hidden) float32: code - zero point, times the scale of its group."""
        index = np.asarray(tokens, dtype=np.intp)
        codes = self._rows[index]
        if self._nibbles:
            codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(len(codes), 2 * codes.shape[1])
        rows = codes.astype(np.float32)
        if self._scale is None:
            return rows
        scale = self._scale[index]
        groups = rows.reshape(*scale.shape, self._group)
        groups -= self._zero
        groups *= scale[..., None]
        return rows
