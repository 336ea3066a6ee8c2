"""From a shard to a device, a bounded piece at a time: whole tensors, or a matrix in blocks of its rows.

Bytes are read into a staging buffer, and go from there to the device. For a GPU there are two, in pinned memory and
in turns, so that the next piece is read while the last one is still being copied and worked on; the host waits for
nothing else. On a CPU there is one small buffer, so that the peak is the weights and next to nothing.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import torch

from quasr.errors import CheckpointError, ResourceError
from quasr.weights.shard import DTYPES, ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from quasr.weights.shard import Shard

BUFFERS = {"cpu": (1, 4 << 20), "cuda": (2, 32 << 20)}
"""How many staging buffers, and of how many bytes each: a multiple of every item size."""


class _Buffer:
    """Memory of the host that copies to `device` start from. `wait` before it is written again."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._device, pinned = device, device.type == "cuda"
        self.bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._copied = torch.cuda.Event() if pinned else None

    def mark(self) -> None:
        """Notes that all copies from the buffer have been asked for. Those within main memory are done by then."""
        if self._copied:
            self._copied.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        if self._copied:
            self._copied.synchronize()


class Staging:
    """Staging buffers for one device, and what is only checked when all is read."""

    def __init__(self, device: torch.device) -> None:
        """Raises ResourceError where there is no memory for the buffers."""
        self.device = device
        count, self.size = BUFFERS["cuda" if device.type == "cuda" else "cpu"]
        with _memory_errors(device):
            self._buffers = cycle([_Buffer(self.size, device) for _ in range(count)])
        self._finite: list[tuple[str, Tensor]] = []

    def pieces(self, shard: Shard, name: str, start: int, end: int) -> Iterator[Tensor]:
        """The bytes of a tensor from `start` to `end`: flat pieces on the host, in the stored dtype and in order.

        A piece is valid until the next is taken; copies to the device may be `non_blocking`.
        """
        for position in range(start, end, self.size):
            buffer = next(self._buffers)
            buffer.wait()
            piece = buffer.bytes[: min(self.size, end - position)]
            shard.read(name, position, piece)
            yield piece.view(DTYPES[shard.entries[name].dtype])
            buffer.mark()

    def note_finite(self, name: str, tensor: Tensor) -> None:
        """Looks for infinite numbers on the device, without waiting for the answer."""
        self._finite.append((name, tensor.isfinite().all()))

    def check_finite(self) -> None:
        """Raises CheckpointError where `note_finite` saw a number that float16 cannot hold."""
        if self._finite and not bool(torch.stack([finite for _, finite in self._finite]).all()):
            name = next(name for name, finite in self._finite if not bool(finite))
            raise CheckpointError(f"{name} holds values beyond float16: use dtype bfloat16 or float32")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint that is still to be read: `dtype` is what it is to become on the device."""

    shard: Shard
    name: str
    dtype: torch.dtype
    staging: Staging

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shard.entries[self.name].shape

    @property
    def device(self) -> torch.device:
        """Where it is to be."""
        return self.staging.device

    def whole(self) -> Tensor:
        """All of it, in memory of its own. Raises CheckpointError and ResourceError."""
        tensor = self._empty(self.shape)
        self._fill(tensor, 0)
        return tensor

    def blocks(self) -> Iterator[Tensor]:
        """A (rows, columns) tensor in blocks of rows, each about as large as a staging buffer, in order.

        A block is valid until the next is taken. Raises as `whole`.
        """
        rows, columns = self.shape
        step = max(1, self.staging.size // max(1, columns * self._item))
        memory = self._empty((min(step, rows), columns))
        for row in range(0, rows, step):
            block = memory[: min(step, rows - row)]
            self._fill(block, row * columns)
            yield block

    @property
    def _item(self) -> int:
        return ITEM_BYTES[self.shard.entries[self.name].dtype]

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        with _memory_errors(self.device):
            return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _fill(self, tensor: Tensor, first: int) -> None:
        """With the numbers from `first` on."""
        flat, position = tensor.view(-1), 0
        start, end = first * self._item, (first + len(flat)) * self._item
        for piece in self.staging.pieces(self.shard, self.name, start, end):
            part = flat[position : position + len(piece)]
            # Converted where it arrives: between devices, `copy_` would do it on the host, and wait.
            same = piece.dtype == part.dtype
            part.copy_(piece if same else piece.to(self.device, non_blocking=True), non_blocking=True)
            if self.dtype == torch.float16:
                self.staging.note_finite(self.name, part)
            position += len(piece)


@contextmanager
def _memory_errors(device: torch.device) -> Iterator[None]:
    """Turns what torch raises where memory runs out into an error of ours."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0][:120]
        raise ResourceError(f"{device} cannot hold the weights ({reason}): use a smaller dtype or model") from error
