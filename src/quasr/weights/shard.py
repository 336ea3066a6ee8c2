"""Safetensors files: a checked header, and the bytes of tensors read into memory that the caller keeps.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps.
The library's own reader is not used, because its mapped pages stay resident beside every converted tensor. Reading
instead needs one buffer, is quicker than faulting pages in, and survives a file that is cut off meanwhile.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from quasr.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
ITEM_BYTES |= {f"{sign}{bits}": bits // 8 for sign in "IU" for bits in (8, 16, 32, 64)}

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""The stored types that a network's weights may have."""

DTYPES = FLOATS | {"I8": torch.int8, "U8": torch.uint8}
"""With those of quantised weights."""

AGAIN = "download the checkpoint again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor; `start` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


class Shard:
    """One open safetensors file. Raises CheckpointError, which names the file, for anything out of order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            self.entries = _read_entries(self._file.read, path.stat().st_size)
        except OSError as error:
            self._file.close()
            raise self._unreadable(error) from error
        except ValueError as error:
            self._file.close()
            raise CheckpointError(f"{path} is no sound safetensors file ({error}): {AGAIN}") from error

    def read(self, name: str, start: int, buffer: Tensor) -> None:
        """Fills `buffer`, (n,) uint8 in main memory, with the tensor's bytes from its byte `start` on.

        Raises CheckpointError where the file cannot be read, or has become shorter.
        """
        view = buffer.numpy().data
        try:
            self._file.seek(self.entries[name].start + start)
            while len(view):
                count = self._file.readinto(view)
                if not count:
                    raise CheckpointError(f"{self.path} was cut off while it was read: {AGAIN}")
                view = view[count:]
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.path} cannot be read: {error.strerror}: {AGAIN}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _read_entries(read: Any, size: int) -> dict[str, Entry]:
    """Checks all of a file but the numbers in it. `read(n)` gives the next bytes. Raises ValueError."""
    if size < 8:
        raise ValueError(f"it has only {size} bytes")
    length = int.from_bytes(read(8), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError("its header is longer than the file: corrupt or cut off")
    try:
        header = json.loads(read(length).decode(), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("its header is nested too deep") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(name, raw, 8 + length) for name, raw in header.items()}
    _check_coverage(entries, 8 + length, size)
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("its header names a tensor twice")
    return table


def _entry(name: str, raw: Any, base: int) -> Entry:
    try:
        dtype, shape, (start, end) = raw["dtype"], raw["shape"], raw["data_offsets"]
        item = ITEM_BYTES[dtype]
        sound = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its entry for {name[:80]!r} is malformed") from error
    if not sound or end - start != math.prod(shape) * item:
        raise ValueError(f"shape and offsets of {name[:80]!r} do not fit")
    return Entry(dtype, tuple(shape), base + start, base + end)


def _check_coverage(entries: dict[str, Entry], base: int, size: int) -> None:
    """Tensors must follow each other without gap or overlap up to the file's last byte."""
    position = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise ValueError(f"{name[:80]!r} leaves a gap or overlaps another tensor")
        position = entry.end
    if position != size:
        raise ValueError(f"it has {size} bytes where its header promises {position}")
