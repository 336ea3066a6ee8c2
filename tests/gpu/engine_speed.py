"""Audio seconds a second and memory of the fast engine on a GPU, on random weights of the 1.7B shape.

    python tests/gpu/engine_speed.py int8 1 16 64 256

Clips of 30 s of noise with 120 forced tokens each; the first run compiles, the next two capture graphs, the fourth
counts; the memory is the most of all four. What `docs/log.md` says of the engine was measured so.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from quasr.engine.base import ClipRequest
from quasr.engine.device import Placement
from quasr.engine.fast_engine import FastEngine
from quasr.model.asr import Qwen3ASR
from quasr.model.config import AudioConfig, ModelConfig, TextConfig
from quasr.quant.apply import quantise
from quasr.quant.recipe import recipe_for

AUDIO = AudioConfig(layers=24, width=1024, heads=16, ffn=4096, output=2048)
TEXT = TextConfig(vocab_size=151936, hidden=2048, layers=28, heads=16, kv_heads=8, head_dim=128, ffn=6144)
SECONDS, TOKENS = 30, 120
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


def measure(engine: FastEngine, clips: int, weights: int) -> str:
    """One line about so many clips at once."""
    rng = np.random.default_rng(0)
    noise = [(rng.standard_normal(SECONDS * 16000) * 0.1).astype(np.float32) for _ in range(4)]
    requests = [ClipRequest(noise[i % 4], tuple(range(9)), tuple(range(8)), TOKENS) for i in range(clips)]
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        engine.run(requests)
    torch.cuda.synchronize()
    before = [getattr(engine.stats, stage) for stage in STAGES]
    started = time.perf_counter()
    engine.run(requests)
    torch.cuda.synchronize()
    wall = time.perf_counter() - started
    spent = [1000 * (getattr(engine.stats, stage) - old) for stage, old in zip(STAGES, before, strict=True)]
    peak = (torch.cuda.max_memory_allocated() - weights) / 1e9
    return (
        f"{clips} clips: {SECONDS * clips / wall:.0f} audio s/s; encode {spent[0]:.1f}, prefill {spent[1]:.1f}, "
        f"generate {spent[2]:.1f} ms = {spent[2] / (TOKENS - 1):.3f} ms a token; {peak:.3f} GB over the weights"
    )


def main() -> None:
    scheme, *batches = sys.argv[1:]
    device = torch.device("cuda", 0)
    engine = FastEngine(build(scheme, device), (), Placement(device, torch.bfloat16), scheme)
    weights = engine.info.weight_bytes
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {scheme}: {weights / 1e9:.2f} GB of weights")
    for clips in map(int, batches):
        print(measure(engine, clips, weights), flush=True)


if __name__ == "__main__":
    main()
