"""Which engine runs a network, and why."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from quasr.engine import fast, fast_audio
from quasr.engine.fast_engine import FastEngine, FastOptions
from quasr.engine.torch_engine import TorchEngine
from quasr.errors import OptionError
from quasr.kernels import dispatch

if TYPE_CHECKING:
    from collections.abc import Collection

    from quasr.engine.base import Engine
    from quasr.engine.device import Placement
    from quasr.model.asr import Qwen3ASR

EngineName = Literal["auto", "fast", "torch"]


def prepare_kernels(placement: Placement) -> None:
    """Imports what a GPU's engine launches; for the time before weights are read.

    Meanwhile a thread lets Triton hash its own library, 450 MB, for which its first launch would wait: the hash is part
    of the name by which a compiled kernel is found again.
    """
    if placement.device.type != "cuda" or dispatch.choose(placement.device, placement.dtype).name != "triton":
        return
    from triton.runtime import cache

    if hasattr(cache, "triton_key"):
        threading.Thread(target=cache.triton_key, name="quasr-triton-key", daemon=True).start()


def make_engine(
    model: Qwen3ASR,
    stop_ids: Collection[int],
    placement: Placement,
    scheme: str,
    engine: EngineName = "auto",
    cache_bytes: int | None = None,
) -> Engine:
    """The engine for a network that lies on `placement.device`; the reason stands in its `info.reasons`.

    "auto" is the fast engine on a GPU where it has kernels for all layers; `cache_bytes` bounds its cache.
    Raises OptionError where "fast" is asked for and has none.
    """
    why_not = _why_not_fast(model, placement)
    if engine == "fast" and why_not and placement.device.type == "cuda":
        raise OptionError(why_not)
    if engine == "torch" or (engine == "auto" and why_not):
        why = "the torch engine was asked for" if engine == "torch" else f"the torch engine: {why_not}"
        return TorchEngine(model, stop_ids, replace(placement, reasons=(*placement.reasons, why)), scheme)
    return FastEngine(model, stop_ids, placement, scheme, FastOptions(cache_bytes=cache_bytes))


def _why_not_fast(model: Qwen3ASR, placement: Placement) -> str | None:
    """One line, or None where the fast engine is the better one."""
    if placement.device.type != "cuda":
        return "the fast engine is made for GPUs"
    kernels = dispatch.choose(placement.device, placement.dtype)
    if not kernels.capturable:
        return f"only plain kernels run here: {kernels.reason}"
    return _lacking_kernels(model)


def _lacking_kernels(model: Qwen3ASR) -> str | None:
    """Which layer the fast engine has no kernel for, in one line."""
    return fast.refusal(model.decoder) or fast_audio.refusal(model.encoder)
