"""Audio seconds a second and memory of the fast engine on a GPU, on random weights of the 1.7B shape.

    python tests/gpu/engine_speed.py int8 1 16 64 256
    python tests/gpu/engine_speed.py bf16 mixed 16 64 256

Clips of 30 s of noise with 120 forced tokens each; or, mixed, of 5 to 30 s with four tokens a second, four times as
many as are decoded together. The first run compiles, the next two capture graphs, then the middle of five counts; the
slowest and the fastest are given beside it: one that meets a number of rows for the first time compiles once more. The
memory is the most of all eight. What `docs/log.md` says of the engine was measured so.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from quasr.engine.base import ClipRequest
from quasr.engine.device import Placement
from quasr.engine.fast_engine import FastEngine, FastOptions
from quasr.model.asr import Qwen3ASR
from quasr.model.config import AudioConfig, ModelConfig, TextConfig
from quasr.quant.apply import quantise
from quasr.quant.recipe import recipe_for

if TYPE_CHECKING:
    from collections.abc import Sequence

AUDIO = AudioConfig(layers=24, width=1024, heads=16, ffn=4096, output=2048)
TEXT = TextConfig(vocab_size=151936, hidden=2048, layers=28, heads=16, kv_heads=8, head_dim=128, ffn=6144)
SECONDS, LEAST_SECONDS, TOKENS_A_SECOND = 30, 5, 4
TOKENS = SECONDS * TOKENS_A_SECOND
WARM, COUNTED = 3, 5
STAGES = ("encode_seconds", "prefill_seconds", "generate_seconds")


def build(scheme: str, device: torch.device) -> Qwen3ASR:
    """Random bf16 weights, quantised as `scheme` says."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = Qwen3ASR(ModelConfig(AUDIO, TEXT, "hf")).requires_grad_(False).eval()
    torch.set_default_dtype(torch.float32)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.02)
    quantise(model, recipe_for(scheme))
    torch.cuda.empty_cache()
    return model


def clips_of(seconds: Sequence[int]) -> list[ClipRequest]:
    rng = np.random.default_rng(0)
    noise = [(rng.standard_normal(SECONDS * 16000) * 0.1).astype(np.float32) for _ in range(4)]
    return [
        ClipRequest(noise[index % 4][: length * 16000], tuple(range(9)), tuple(range(8)), length * TOKENS_A_SECOND)
        for index, length in enumerate(seconds)
    ]


def measure(engine: FastEngine, seconds: Sequence[int], weights: int) -> str:
    """One line about clips of so many seconds."""
    requests = clips_of(seconds)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM):
        engine.run(requests)
    runs = sorted(timed(engine, requests) for _ in range(COUNTED))
    wall, *spent = runs[COUNTED // 2]
    peak = (torch.cuda.max_memory_allocated() - weights) / 1e9
    speeds = [f"{sum(seconds) / one[0]:.0f}" for one in (runs[COUNTED // 2], runs[-1], runs[0])]
    each = f" = {1000 * spent[2] / (TOKENS - 1):.3f} ms a token" if set(seconds) == {SECONDS} else ""
    return (
        f"{len(seconds)} clips: {speeds[0]} audio s/s ({speeds[1]} to {speeds[2]}); {1000 * wall:.1f} ms: encode "
        f"{1000 * spent[0]:.1f}, prefill {1000 * spent[1]:.1f}, generate {1000 * spent[2]:.1f}{each}; "
        f"{peak:.3f} GB over the weights"
    )


def timed(engine: FastEngine, requests: Sequence[ClipRequest]) -> list[float]:
    """Seconds of one call, and what of them each stage took."""
    torch.cuda.synchronize()
    before = [getattr(engine.stats, stage) for stage in STAGES]
    started = time.perf_counter()
    engine.run(requests)
    torch.cuda.synchronize()
    wall = time.perf_counter() - started
    return [wall, *(getattr(engine.stats, stage) - old for stage, old in zip(STAGES, before, strict=True))]


def main() -> None:
    scheme, *batches = sys.argv[1:]
    device = torch.device("cuda", 0)
    model = build(scheme, device)
    mixed = batches[0] == "mixed"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {scheme}{', mixed' if mixed else ''}")
    for rows in map(int, batches[mixed:]):
        engine = FastEngine(model, (), Placement(device, torch.bfloat16), scheme, FastOptions(rows=rows))
        lengths = np.random.default_rng(1).integers(LEAST_SECONDS, SECONDS + 1, 4 * rows).tolist()
        told = measure(engine, lengths if mixed else [SECONDS] * rows, engine.info.weight_bytes)
        print(f"{rows} at once, {told}", flush=True)
        engine.close()


if __name__ == "__main__":
    main()
