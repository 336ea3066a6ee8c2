"""Samples on their way to a GPU: threads copy them into page-locked memory while the caller launches kernels.

Clips are joined there as `mel_torch.join` joins them, some of them to a block. Blocks are used again in turn, each as
soon as the device has read it. The threads only copy: calls of CUDA from them would spoil a graph's capture.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from quasr.engine.mel_torch import join, joined_size, padded_size

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

BLOCK_SAMPLES = 1 << 21
"""8 MB: four clips of 30 s. A longer clip has a block of its own size, which is not kept."""

BLOCKS = 8
"""Most blocks that are kept: 64 MB, one and a half of the largest parts that are encoded at once."""

THREADS = 4
"""One copies 2 to 5 GB a second. The first part is waited for, so it is copied by several."""

Clips: TypeAlias = "Sequence[NDArray[np.float32]]"


class Block(Protocol):
    """Memory (n,) float32 that samples stand in until the device has them."""

    memory: NDArray[np.float32]

    def send(self, out: Tensor) -> None:
        """Queues a copy of the first samples to `out` on the device."""
        ...

    def is_read(self) -> bool:
        """Whether the device has made the copy that was queued last."""
        ...

    def wait(self) -> None:
        """Returns when it has."""
        ...


class PinnedBlock:
    """Page-locked memory for the current CUDA device, in the order of the current stream."""

    def __init__(self, samples: int) -> None:
        self._tensor = torch.empty(samples, pin_memory=True)
        self._read = torch.cuda.Event()
        self.memory: NDArray[np.float32] = self._tensor.numpy()

    def send(self, out: Tensor) -> None:
        out.copy_(self._tensor[: len(out)], non_blocking=True)
        self._read.record()

    def is_read(self) -> bool:
        return self._read.query()

    def wait(self) -> None:
        self._read.synchronize()


class Staging:
    """Brings clips to `device`. One caller at a time; `make` gives blocks, None where the device is this machine's."""

    def __init__(self, device: torch.device, make: Callable[[int], Block] | None) -> None:
        self._device = device
        self._make = make
        self._threads: ThreadPoolExecutor | None = None
        self._waiting: deque[Clips] = deque()
        self._filled: deque[tuple[Block, Future[None] | None]] = deque()
        self._free: deque[Block] = deque()

    @classmethod
    def on(cls, device: torch.device) -> Staging:
        """For this device: page-locked memory for a GPU."""
        return cls(device, PinnedBlock if device.type == "cuda" else None)

    def send(self, parts: Sequence[Clips]) -> Generator[Tensor, None, None]:
        """Of each part its clips of (n,) samples, joined, on the device; while one is used, the next are being copied.

        Close it where it is not used to its end. What goes wrong with a clip is raised with its part.
        """
        if self._make is None:
            yield from map(_joined, parts)
            return
        groups = [_groups(part) for part in parts]
        try:
            # An interrupt may have cut the end of the last call short.
            self._recall()
            self._waiting.extend(chain.from_iterable(groups))
            for part, own in zip(parts, groups, strict=True):
                yield self._send_part(part, own)
        finally:
            self._recall()

    def close(self) -> None:
        """Ends the threads and drops the memory."""
        if self._threads is not None:
            self._threads.shutdown()
        self._threads = None
        self._recall()
        self._free.clear()

    def _recall(self) -> None:
        """Forgets what is waiting, and takes all blocks back, which no thread writes to any more."""
        self._waiting.clear()
        wait([copied for _, copied in self._filled if copied])
        while self._filled:
            self._release()

    def _send_part(self, part: Clips, groups: Sequence[Clips]) -> Tensor:
        out = torch.empty(joined_size([len(clip) for clip in part]), device=self._device)
        first = 0
        for group in groups:
            size = _size(group)
            self._filled_block().send(out[first : first + size])
            self._release()
            first += size
        self._fill_ahead()
        return out

    def _filled_block(self) -> Block:
        """The block of the next group, which is the first of those that are filled."""
        if self._filled or len(self._waiting) > 1:
            self._fill_ahead()
        if not self._filled:
            self._fill_now()
        block, copied = self._filled[0]
        if copied:
            copied.result()
        return block

    def _fill_ahead(self) -> None:
        """Has threads copy as many groups as there are blocks for, where Python gives any."""
        while self._waiting:
            block = self._free_block(_size(self._waiting[0]))
            if block is None:
                return
            self._threads = self._threads or ThreadPoolExecutor(THREADS, "quasr-staging")
            try:
                copied = self._threads.submit(join, self._waiting[0], block.memory)
            except RuntimeError:
                # Python's main thread has ended, or there can be no more: then the caller copies, and not into this
                # block, because a thread may have been given it all the same.
                return
            self._waiting.popleft()
            self._filled.append((block, copied))

    def _fill_now(self) -> None:
        """Copies the next group: the only one, a long clip, or one for which there is no thread or no free block."""
        assert self._make is not None
        group = self._waiting.popleft()
        size = _size(group)
        block = self._free_block(size) or (self._make(size) if size > BLOCK_SAMPLES else self._free.popleft())
        self._filled.append((block, None))
        block.wait()
        join(group, block.memory)

    def _free_block(self, size: int) -> Block | None:
        """A block of the usual size that may be overwritten now, if there is one or may be one more."""
        assert self._make is not None
        if size > BLOCK_SAMPLES:
            return None
        if self._free and self._free[0].is_read():
            return self._free.popleft()
        return self._make(BLOCK_SAMPLES) if len(self._free) + len(self._filled) < BLOCKS else None

    def _release(self) -> None:
        """Of the filled blocks the first may be used again, once the device has read it."""
        block, _ = self._filled.popleft()
        if len(block.memory) == BLOCK_SAMPLES:
            self._free.append(block)


def _joined(clips: Clips) -> Tensor:
    out = torch.empty(joined_size([len(clip) for clip in clips]))
    join(clips, out.numpy())
    return out


def _groups(clips: Clips) -> list[Clips]:
    """Neighbours that fit into one block together."""
    groups: list[list[NDArray[np.float32]]] = []
    room = 0
    for clip in clips:
        size = padded_size(len(clip))
        if size > room:
            groups.append([])
            room = BLOCK_SAMPLES
        groups[-1].append(clip)
        room -= size
    return list(groups)


def _size(clips: Clips) -> int:
    return sum(padded_size(len(clip)) for clip in clips)
