"""The stages of one clip on a CPU: `python -m quasr.bench.stages FOLDER`, one engine a process.

An ONNX folder runs without torch, so that the peak of memory is the engine's own, and QUASR_NATIVE says who decodes; a
checkpoint runs in torch, in the precision given. Between the calls another process measures how fast memory is read:
what a token takes is also told as a multiple of what reading the decoder's weights once would take.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quasr.bench.reading import measure_elsewhere
from quasr.bench.systems import Prompt
from quasr.engine.base import ClipRequest
from quasr.engine.device import choose, peak_memory
from quasr.export.manifest import is_onnx_folder
from quasr.model.config import read_config
from quasr.types import SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quasr.bench.reading import Reading
    from quasr.engine.base import Engine

PRECISIONS = ("fp32", "bf16", "dynamic-int8")
"""Of torch. The last is torch's own `quantize_dynamic` on every linear layer of an fp32 network."""

DECODER_WEIGHTS = "decoder.onnx.data"
"""Of an ONNX folder: what a step reads, but for a page of small tensors."""

MILLISECONDS = 1000.0


@dataclass(frozen=True, slots=True)
class Stages:
    """Milliseconds from samples to audio vectors, of the prompt, and of each further token; seconds of all."""

    encoder: float
    prefill: float
    token: float
    seconds: float


def open_engine(folder: Path, precision: str, threads: int) -> Engine:
    """The engine of an ONNX folder, or torch's in `precision`; nothing stops either before its budget."""
    if is_onnx_folder(folder):
        from quasr.engine.onnx_engine import OnnxEngine
        from quasr.engine.onnx_session import choose_runtime

        return OnnxEngine(folder, frozenset(), choose_runtime("cpu", threads))
    import torch

    from quasr.engine.torch_engine import TorchEngine
    from quasr.weights.load import load_model

    torch.set_num_threads(threads)
    placement = choose("cpu", "bf16" if precision == "bf16" else "fp32")
    network = load_model(folder, read_config(folder), placement.dtype, placement.device)
    if precision == "dynamic-int8":
        network = torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear}, torch.qint8)
    return TorchEngine(network, frozenset(), placement)


def measure(
    engine: Engine, request: ClipRequest, repeats: int, between: Callable[[], None] = lambda: None
) -> list[Stages]:
    """As many calls, after one that is not counted; `between` before each."""
    found = []
    for _ in range(repeats + 1):
        between()
        before, started = asdict(engine.stats), time.perf_counter()
        (result,) = engine.run([request])
        seconds = time.perf_counter() - started
        spent = {name: MILLISECONDS * (value - before[name]) for name, value in asdict(engine.stats).items()}
        token = spent["generate_seconds"] / max(1, len(result.tokens) - 1)
        found.append(Stages(spent["encode_seconds"], spent["prefill_seconds"], token, seconds))
    return found[1:]


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m quasr.bench.stages", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    for name, value in (("--threads", 2), ("--seconds", 11), ("--tokens", 48), ("--repeats", 5)):
        parser.add_argument(name, type=int, default=value)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Writes one line of JSON: the engine, the least and the median of every stage, MB at the peak, GB/s read."""
    options = _arguments(arguments)
    prompt = Prompt.of(read_config(options.folder))
    noise = np.random.default_rng(0).standard_normal(options.seconds * SAMPLE_RATE, dtype=np.float32) / 10
    request = ClipRequest(noise, prompt.prefix, prompt.suffix, options.tokens)
    engine = open_engine(options.folder, options.precision, options.threads)
    readings: list[Reading] = []
    found = measure(engine, request, options.repeats, lambda: readings.append(measure_elsewhere(options.threads)))
    table = np.array([list(asdict(one).values()) for one in found])
    figures = {
        name: dict(zip(asdict(Stages(0, 0, 0, 0)), np.round(numbers, 4).tolist(), strict=True))
        for name, numbers in (("least", table.min(axis=0)), ("median", np.median(table, axis=0)))
    }
    peak, _ = peak_memory()
    memory = {"peak_mb": (peak or 0) // 10**6, "weights_mb": engine.info.weight_bytes // 10**6}
    limit = _limit(options.folder, [one.speed for one in readings], figures)
    engine_facts = {"engine": engine.info.name, "reasons": engine.info.reasons}
    sys.stdout.write(json.dumps({**engine_facts, **figures, **memory, **limit, "read": readings[0].method}) + "\n")
    return 0


def _limit(folder: Path, speeds: Sequence[float], figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """GB/s read, and the least time of a token over that of reading a folder's decoder at the best of these speeds: all
    of it, although a step reads some half of a head that the decoder in C keeps in halves."""
    limit = {"read_gbs": round(max(speeds) / 1e9, 2), "read_gbs_median": round(float(np.median(speeds)) / 1e9, 2)}
    if not is_onnx_folder(folder):
        return limit
    reading = MILLISECONDS * (folder / DECODER_WEIGHTS).stat().st_size / max(speeds)
    return {**limit, "times_limit": round(figures["least"]["token"] / reading, 3)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
