"""Transcribes long audio in what a second process leaves free of a GPU, and tells what the driver saw.

    python tests/gpu/memory_cap.py MODEL AUDIO --cap 4 --memory 4GB --minutes 30

AUDIO is repeated to the wanted length: a file, or an .npy array of float32 samples at 16 kHz. Needs nvidia-ml-py.
The exit code says whether the transcription came to its end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pynvml
import torch

import quasr
from quasr.audio.decode import load

GIB = 2**30


def fill(leave: float) -> None:
    """Takes all of the GPU but `leave` GiB, says "ready", and keeps it until standard input ends."""
    torch.zeros(1, device="cuda")
    rest, kept = torch.cuda.mem_get_info()[0] - int(leave * GIB), []
    while rest > 0:
        kept.append(torch.empty(min(rest, 16 * GIB), dtype=torch.uint8, device="cuda"))
        rest -= len(kept[-1])
    print("ready", flush=True)
    sys.stdin.read()


def work(options: argparse.Namespace) -> None:
    """Prints what came out and what torch counted."""
    samples = np.load(options.audio) if options.audio.suffix == ".npy" else load(options.audio)
    samples = np.resize(samples, round(options.minutes * 60 * 16000))
    with quasr.load(options.model, device="cuda", memory=options.memory) as transcriber:
        started = time.perf_counter()
        result = transcriber.transcribe((samples, 16000), max_new_tokens=options.tokens)
        found = {
            "seconds": round(time.perf_counter() - started, 1),
            "segments": len(result.segments),
            "tokens": transcriber.stats.tokens,
            "reasons": transcriber.info.reasons,
        }
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    print(json.dumps({**found, "tensors_gib": allocated / GIB, "reserved_gib": reserved / GIB}))


class Watch(threading.Thread):
    """The most memory that the driver sees in use, beyond what was in use at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        pynvml.nvmlInit()
        self._device = pynvml.nvmlDeviceGetHandleByIndex(0)
        self._start = self._used()
        self.peak = 0
        self.start()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, self._used() - self._start)
            time.sleep(0.02)

    def _used(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._device).used)


def capped(arguments: list[str], cap: float) -> int:
    """Runs `work` in a process of its own beside `fill`; the exit code of `work`."""
    with subprocess.Popen(
        [sys.executable, __file__, "--fill", str(cap)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        watch = Watch()
        code = subprocess.run([sys.executable, __file__, "--work", *arguments], check=False).returncode
        print(json.dumps({"cap_gib": cap, "driver_peak_gib": round(watch.peak / GIB, 3), "ended": code == 0}))
        other.communicate()
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("audio", nargs="?", type=Path)
    parser.add_argument("--cap", type=float, default=4.0, help="GiB that are left free")
    parser.add_argument("--memory", default="4GB", help="the plan's budget")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--tokens", type=int, default=120, help="most new tokens of a piece")
    parser.add_argument("--fill", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fill is not None:
        fill(options.fill)
        return 0
    if options.model is None or options.audio is None:
        parser.error("MODEL and AUDIO are needed")
    if options.work:
        work(options)
        return 0
    return capped(sys.argv[1:], options.cap)


if __name__ == "__main__":
    sys.exit(main())
