"""Safetensors files: a checked header and tensors copied out of a memory map, slice by slice.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps.
The library's own reader is not used, because its mapped pages stay resident beside every converted tensor;
here each slice's pages are given back as soon as it is copied.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from quasr.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

SLICE_BYTES = 4 << 20
"""Copied at once: bounds what is resident beside the tensors themselves. A multiple of every item size and page."""

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


class Shard:
    """One open safetensors file. Raises CheckpointError, which names the file, for anything out of order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # One buffer for all pieces: freed ones would stay in the heap between the tensors that are kept.
        self._buffer = torch.empty(SLICE_BYTES, dtype=torch.uint8)
        try:
            with path.open("rb") as file:
                self.entries = _read_entries(file.read, path.stat().st_size)
                # A private writable map, because torch warns about read-only buffers. It is never written.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}: {AGAIN}") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is no sound safetensors file ({error}): {AGAIN}") from error

    def raw(self, name: str) -> Iterator[Tensor]:
        """The tensor's bytes in order, as views (uint8) into the map of at most SLICE_BYTES. Not to be kept."""
        entry = self.entries[name]
        for start in range(entry.start, entry.end, SLICE_BYTES):
            size = min(SLICE_BYTES, entry.end - start)
            yield torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=start)
            self._release(start, size)

    def slices(self, name: str) -> Iterator[Tensor]:
        """The tensor as flat pieces in order, in the stored dtype. A piece is valid until the next one is taken."""
        for piece in self.raw(name):
            # Copied as bytes: nothing in the format aligns a tensor to its item size.
            yield self._buffer[: len(piece)].copy_(piece).view(DTYPES[self.entries[name].dtype])

    def _release(self, start: int, size: int) -> None:
        """Drops the pages of a slice from resident memory, on systems that can."""
        if hasattr(self._map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, start + size - first)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()


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
