"""A GPU's CUDA context, made in a thread while the host imports torch.

That takes up to a second, in which the driver needs no Python. torch finds the context there: its runtime works in the
device's primary context, which a process has once, however often it is asked for.
"""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

DRIVER = "libcuda.so.1"

LOADING = "CUDA_MODULE_LOADING"
"""The environment variable by which old drivers load kernels as they are used. torch sets it too, but later."""


@contextmanager
def context_ahead(device: str) -> Iterator[None]:
    """Makes the primary context of `device` (auto, cuda or cuda:N among the visible ones) beside what is done within.

    At the end the context is let go of: it lives on where torch uses it by then. Where there is no driver or no such
    device nothing is made; torch is the one to say so.
    """
    # Not in the thread: other threads may be reading the environment.
    os.environ.setdefault(LOADING, "LAZY")
    opened: list[_Context] = []
    index = int(device.partition(":")[2] or 0)
    thread = threading.Thread(target=lambda: opened.extend(_open(index)), name="quasr-context", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        for context in opened:
            context.release()


class _Context:
    """A device's primary context, held once."""

    def __init__(self, driver: ctypes.CDLL, device: ctypes.c_int) -> None:
        self._driver, self._device = driver, device

    def release(self) -> None:
        self._driver.cuDevicePrimaryCtxRelease_v2(self._device)


def _open(index: int) -> Iterator[_Context]:
    """The context, or nothing. ctypes gives up Python's lock during each of the calls, which give 0 for success."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return
    device, handle = ctypes.c_int(), ctypes.c_void_p()
    # In a forked child of a process that uses CUDA, cuInit is refused, as it is for torch.
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return
    if not driver.cuDevicePrimaryCtxRetain(ctypes.byref(handle), device):
        yield _Context(driver, device)
