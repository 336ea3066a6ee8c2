"""Samples that are copied ahead by threads, with a device that makes its copies late."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from quasr.engine import staging
from quasr.engine.mel_torch import join, joined_size, padded_size
from quasr.engine.staging import Staging

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CPU = torch.device("cpu")
BLOCK = 30_000
LENGTHS = [[8_000, 16_000, 9_000], [1], [40_000, 8_001], [12_345] * 7, [20_000]]


class Device:
    """Copies that are queued, and made when somebody waits."""

    def __init__(self) -> None:
        self.queue: list[tuple[LateBlock, torch.Tensor]] = []
        self.blocks: list[LateBlock] = []

    def block(self, samples: int) -> LateBlock:
        self.blocks.append(LateBlock(self, samples))
        return self.blocks[-1]

    def work(self, copies: int) -> None:
        for block, out in self.queue[:copies]:
            out.copy_(torch.from_numpy(block.memory[: len(out)]))
        del self.queue[:copies]


class LateBlock:
    def __init__(self, device: Device, samples: int) -> None:
        self.memory = np.full(samples, np.nan, np.float32)
        self._device = device

    def send(self, out: torch.Tensor) -> None:
        self._device.queue.append((self, out))

    def is_read(self) -> bool:
        return all(block is not self for block, _ in self._device.queue)

    def wait(self) -> None:
        places = [place for place, (block, _) in enumerate(self._device.queue) if block is self]
        self._device.work(max(places, default=-1) + 1)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "BLOCK_SAMPLES", BLOCK)
    monkeypatch.setattr(staging, "BLOCKS", 3)


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def late(device: Device) -> Iterator[Staging]:
    made = Staging(CPU, device.block)
    yield made
    made.close()


def parts(lengths: list[list[int]]) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return [[rng.standard_normal(length).astype(np.float32) for length in part] for part in lengths]


def joined(clips: list[np.ndarray]) -> np.ndarray:
    out = np.empty(joined_size([len(clip) for clip in clips]), np.float32)
    join(clips, out)
    return out[: sum(padded_size(len(clip)) for clip in clips)]


def assert_same(found: list[torch.Tensor], given: list[list[np.ndarray]]) -> None:
    """But for the end, which may hold anything."""
    for one, clips in zip(found, given, strict=True):
        assert len(one) == joined_size([len(clip) for clip in clips])
        expected = joined(clips)
        assert np.array_equal(one.numpy()[: len(expected)], expected)


def workers() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("quasr-staging")]


@pytest.mark.parametrize("pace", [0, 1, 100])
def test_nothing_is_overwritten_before_it_is_read(device: Device, late: Staging, pace: int) -> None:
    given, found = parts(LENGTHS), []
    for _ in range(3):
        for samples in late.send(given):
            device.work(pace)
            found.append(samples)
    device.work(len(device.queue))
    assert_same(found, given * 3)
    usual = [block for block in device.blocks if len(block.memory) == BLOCK]
    assert len(usual) <= staging.BLOCKS
    # A clip that is longer than a block has its own each time.
    assert sum(len(block.memory) > BLOCK for block in device.blocks) == 3


def test_the_next_part_is_copied_while_one_is_used(device: Device, late: Staging) -> None:
    given = parts([[20_000], [21_000]])
    sending = late.send(given)
    next(sending)
    late._threads.shutdown()  # Returns when all is copied.
    first, second = (block.memory for block in device.blocks)
    for memory, clips in zip((first, second), given, strict=True):
        assert np.array_equal(memory[: len(joined(clips))], joined(clips))
    next(sending)


def test_without_a_gpu_there_is_neither_block_nor_thread() -> None:
    given = parts(LENGTHS)
    assert_same(list(Staging.on(CPU).send(given)), given)
    assert not workers()


def test_no_thread_for_what_nothing_goes_on_beside(device: Device, late: Staging) -> None:
    given = parts([[8_000, 9_000]])
    found = list(late.send(given))
    device.work(1)
    assert_same(found, given)
    assert not workers()


def test_where_python_gives_no_thread_the_caller_copies(device: Device, late: Staging) -> None:
    """As in a thread that goes on when the main one has ended."""
    late._threads = ThreadPoolExecutor(1)
    late._threads.shutdown()
    given = parts(LENGTHS)
    found = list(late.send(given))
    device.work(len(device.queue))
    assert_same(found, given)


def test_close_ends_the_threads(late: Staging) -> None:
    list(late.send(parts(LENGTHS)))
    assert workers()
    late.close()
    assert not workers()


@pytest.mark.parametrize("bad", [0, 1, 4])
def test_an_error_comes_with_its_part_and_blocks_come_back(device: Device, late: Staging, bad: int) -> None:
    given = parts(LENGTHS)
    given[bad][0] = np.zeros((9_000, 2), np.float32)
    sending = late.send(given)
    assert len([next(sending) for _ in range(bad)]) == bad
    with pytest.raises(ValueError, match="broadcast"):
        next(sending)
    good = parts(LENGTHS)
    found = list(late.send(good))
    device.work(len(device.queue))
    assert_same(found, good)
    assert sum(len(block.memory) == BLOCK for block in device.blocks) <= staging.BLOCKS


def test_what_is_left_behind_can_be_followed_by_more(device: Device, late: Staging) -> None:
    abandoned = late.send(parts(LENGTHS))
    next(abandoned)
    abandoned.close()
    given = parts(LENGTHS[::-1])
    found = list(late.send(given))
    device.work(len(device.queue))
    assert_same(found, given)


class Interrupted(deque):  # type: ignore[type-arg]
    """An interrupt comes when something has been put there."""

    def extend(self, values: Iterable[object]) -> None:
        super().extend(values)
        raise KeyboardInterrupt


def test_an_interrupt_before_the_first_part_leaves_nothing_waiting(device: Device, late: Staging) -> None:
    late._waiting = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        next(late.send(parts(LENGTHS)))
    assert not late._waiting


def abandon(late: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begins with some parts, and is interrupted when the threads are waited for."""

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    sending = late.send(parts(LENGTHS))
    next(sending)
    with monkeypatch.context() as patch:
        patch.setattr(staging, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sending.close()


def test_an_interrupt_while_threads_are_waited_for_leaves_no_foreign_samples(
    device: Device, late: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandon(late, monkeypatch)
    given = parts(LENGTHS[::-1])
    found = list(late.send(given))
    device.work(len(device.queue))
    assert_same(found, given)
    assert sum(len(block.memory) == BLOCK for block in device.blocks) <= staging.BLOCKS


def test_close_drops_what_an_interrupt_has_left(device: Device, late: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    abandon(late, monkeypatch)
    device.work(len(device.queue))
    held = [weakref.ref(block) for block in device.blocks]
    device.blocks.clear()
    assert any(block() for block in held)
    late.close()
    gc.collect()
    assert not any(block() for block in held)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_is_busy_gets_every_part() -> None:
    given, found = parts(LENGTHS * 3), []
    late = Staging.on(torch.device("cuda"))
    for samples in late.send(given):
        found.append(samples)
        torch.cuda._sleep(20_000_000)
    assert_same([samples.cpu() for samples in found], given)
    late.close()
