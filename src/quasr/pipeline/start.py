"""What the first load of a process does beside the import of torch, which takes longer than reading the weights."""

from __future__ import annotations

import gc
import os
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING

from quasr.engine.context import context_ahead
from quasr.export.manifest import is_onnx_folder
from quasr.pipeline.onnx import NVIDIA_DRIVERS, torch_reason
from quasr.weights.hub import DEMO, local_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from quasr.pipeline.onnx import EngineWish

AT_ONCE = 1 << 28
"""Bytes that are read in one call of the system, without Python's lock."""


@contextmanager
def head_start(model: str, wish: EngineWish) -> Iterator[None]:
    """`model` is loaded within: where torch is new to the process and a GPU is to run it, that GPU's context is made
    meanwhile, and a folder's weights are read into the page cache."""
    with ExitStack() as stack:
        if "torch" not in sys.modules and _expects_gpu(model, wish):
            stack.enter_context(context_ahead(wish.device))
            folder = local_folder(model)
            if folder is not None:
                threading.Thread(target=_read_ahead, args=(folder,), name="quasr-read-ahead", daemon=True).start()
                # Not where it may be fetched first: that can take long.
                stack.enter_context(_uncollected())
        yield


def _expects_gpu(model: str, wish: EngineWish) -> bool:
    """As far as it is known before torch is asked."""
    if wish.device == "cpu" or not any(path.exists() for path in NVIDIA_DRIVERS) or find_spec("torch") is None:
        return False
    if torch_reason(wish):
        return True
    folder = local_folder(model)
    return wish.engine == "auto" and model != DEMO and folder is not None and not is_onnx_folder(folder)


def _read_ahead(folder: Path) -> None:
    """Sends the files to nowhere, which makes Linux read them and copies nothing: 2 GB that are in the page cache take
    0.1 s. `posix_fadvise` would not do: of a whole file it reads the first piece only.

    What cannot be read is told by those who need it.
    """
    if not hasattr(os, "sendfile"):
        return
    with suppress(OSError), open(os.devnull, "wb") as nowhere:
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                offset = 0
                while count := os.sendfile(nowhere.fileno(), file.fileno(), offset, AT_ONCE):
                    offset += count


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector, which looks through torch's half a million new objects again and again."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
