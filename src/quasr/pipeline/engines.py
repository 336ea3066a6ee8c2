"""Engines from checkpoint folders: the one that was asked for, and the 16-bit one of second tries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quasr.engine.device import choose, memory
from quasr.engine.plan import Candidate, Target, Work, estimate, written
from quasr.errors import ResourceError
from quasr.pipeline.planning import stored_recipe
from quasr.pipeline.retry import SAME_WEIGHTS, Retry
from quasr.quant.recipe import NO_RECIPE

if TYPE_CHECKING:
    from quasr.engine.base import Engine
    from quasr.engine.device import Placement
    from quasr.model.config import ModelConfig
    from quasr.quant.recipe import Recipe
    from quasr.text.tokenizer import Tokenizer

ONE_PIECE = Work(30.0, 2)
"""What a second try runs at most: the two halves of a piece."""

MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint folder, what was read of it, and the tokens that end a transcript."""

    folder: Path
    config: ModelConfig
    stops: frozenset[int]


def stop_ids(config: ModelConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end a transcript: those the checkpoint states, `<|im_end|>` and `<|endoftext|>`."""
    return frozenset({*config.eos_token_ids, tokenizer.special.im_end, tokenizer.special.endoftext})


def torch_engine(
    source: Source, placement: Placement, recipe: Recipe, offload: int = 0, cache_bytes: int | None = None
) -> Engine:
    """The folder's network in torch, quantised by `recipe`; `offload` decoder layers stay in main memory.

    `cache_bytes`: most memory of keys and values that grow with the work, as a memory plan says.
    Raises CheckpointError, ResourceError, OptionError and MissingDependencyError.
    """
    # Here and not above, so that `from quasr import Transcriber` costs no torch.
    from quasr.engine.factory import make_engine, prepare_kernels
    from quasr.quant.store import load_network

    if offload:
        return _offloaded_engine(source, placement, recipe, offload)
    prepare_kernels(placement)
    network, scheme = load_network(source.folder, source.config, recipe, placement.dtype, placement.device)
    return make_engine(network, source.stops, placement, scheme, cache_bytes=cache_bytes)


def _offloaded_engine(source: Source, placement: Placement, recipe: Recipe, count: int) -> Engine:
    import torch

    from quasr.engine.offload import check_offload, offload
    from quasr.engine.torch_engine import TorchEngine
    from quasr.quant.store import load_network

    check_offload(count, source.config.text.layers)
    network, scheme = load_network(source.folder, source.config, recipe, placement.dtype, torch.device("cpu"))
    offload(network, count, placement.device)
    slower = f"{count} of {source.config.text.layers} decoder layers stay in main memory: slower"
    where = replace(placement, reasons=(*placement.reasons, slower))
    return TorchEngine(network, source.stops, where, scheme)


def second_tries(source: Source, placement: Placement, recipe: Recipe, *, planned: bool) -> Retry:
    """What second tries run on beside an engine of `recipe`: 16 bits where that was made from 16 bits.

    Under a memory plan they stay quantised: a second network would break the limit.
    """
    stored = stored_recipe(source.folder)
    if stored is None and not recipe.rules:
        return SAME_WEIGHTS
    if stored is not None:
        return Retry("quantised", "the folder holds no 16-bit weights")
    if planned:
        return Retry("quantised", "a memory limit is set")
    return Retry("16-bit", make=lambda: torch_engine(source, second_place(source.config, placement), NO_RECIPE))


def second_place(config: ModelConfig, placement: Placement) -> Placement:
    """Where the 16-bit network of second tries goes: to the first one's GPU if it has room, else to the CPU.

    On a CPU it is bf16 whatever the first computes in: the checkpoints' own precision, in half of fp32's memory.
    Raises ResourceError where main memory has no room either.
    """
    free = {one.device.partition(" ")[0]: one.free for one in memory()}
    device = str(placement.device)
    if device != "cpu" and _bytes(config, placement.device.type, placement.dtype_name) <= free.get(device, 0):
        return replace(placement, reasons=(*placement.reasons, f"{device} has room for second tries in 16 bits"))
    needed, there = _bytes(config, "cpu", "bf16"), _available(free.get("cpu"))
    if there is not None and needed > there:
        raise ResourceError(f"its 16-bit weights need {written(needed)}, and {written(there)} are free")
    return choose("cpu", "bf16")


def _bytes(config: ModelConfig, device: str, dtype: str) -> int:
    """Of weights, cache and activations; the process and its CUDA context are there already."""
    target = Target("cpu" if device == "cpu" else "cuda", dtype)
    return estimate(config, Candidate(dtype, NO_RECIPE, target), ONE_PIECE).tensors


def _available(free: int | None) -> int | None:
    """Bytes of main memory that can be had, files in the page cache counted in where Linux tells; None if unknown."""
    if not MEMINFO.is_file():
        return free
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
