"""Milliseconds of prefill on a GPU, plainly and from CUDA graphs, on random weights of the 1.7B shape.

    python tests/gpu/prompt_speed.py int8 1 4 10 20

Prompts of 407 tokens, as a clip of 30 s has. Host: until the call returns; all: until the device is done; medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from engine_speed import TEXT, build

from quasr.engine import graphs
from quasr.engine.fast import FastDecoder
from quasr.engine.graphs import GraphedPrefill, GraphMemory, Graphs
from quasr.kernels import dispatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

TOKENS, REPEATS = 407, 20


def measure(prefill: Callable[..., Tensor], clips: int, decoder: FastDecoder) -> tuple[str, Tensor]:
    """What it takes, and the hidden states. The first calls compile and capture."""
    device = decoder.norm.weight.device
    x = torch.randn(clips * TOKENS, TEXT.hidden, generator=torch.Generator(device).manual_seed(0), device=device)
    cache = decoder.allocate_cache(clips * TOKENS)
    run = partial(prefill, x, [TOKENS] * clips, [TOKENS * clip for clip in range(clips)], cache)
    for _ in range(3):
        run()
    host, whole = [], []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        found = run()
        host.append(time.perf_counter() - began)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - began)
    return f"host {1000 * statistics.median(host):.2f}, all {1000 * statistics.median(whole):.2f} ms", found.clone()


@torch.inference_mode()
def main() -> None:
    scheme, *counts = sys.argv[1:]
    device = torch.device("cuda", 0)
    kernels = dispatch.choose(device, torch.bfloat16)
    decoder = FastDecoder.from_model(build(scheme, device).decoder, kernels)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {scheme}: {kernels.reason}")
    whole = graphs.attends_whole
    for clips in map(int, counts):
        line, expected = measure(decoder.prefill, clips, decoder)
        print(f"{clips} clips, plainly: {line}", flush=True)
        ways = {"whole prompts": whole} | ({"token by token": lambda _: False} if clips < 3 else {})
        for name, graphs.attends_whole in ways.items():
            graphed = GraphedPrefill(decoder, partial(Graphs, memory=GraphMemory()))
            before = torch.cuda.memory_reserved()
            line, found = measure(graphed.prefill, clips, decoder)
            error, more = (found - expected).norm() / expected.norm(), torch.cuda.memory_reserved() - before
            print(
                f"{clips} clips, {name} in a graph: {line}; differ by {error:.1e}; {more / 1e6:.0f} MB more", flush=True
            )
            graphed.forget()


if __name__ == "__main__":
    main()
