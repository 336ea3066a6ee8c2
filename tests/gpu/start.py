"""Seconds from the start of a process until a saved folder is loaded on a GPU, and until a first clip is transcribed.

    TRITON_CACHE_DIR=cache python tests/gpu/start.py FOLDER

The first time with an empty cache directory kernels are compiled; the second time they are there.
"""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np

SECONDS, TOKENS = 6, 24


def work(folder: str, started: float) -> None:
    """Prints seconds since `started`."""
    import quasr

    noise = (np.random.default_rng(0).standard_normal(SECONDS * 16000) * 0.1).astype(np.float32)
    transcriber = quasr.load(folder, device="cuda")
    loaded = time.time() - started
    transcriber.transcribe((noise, 16000), max_new_tokens=TOKENS)
    print(f"loaded {loaded:.2f} s, a clip of {SECONDS} s transcribed {time.time() - started:.2f} s after the start")


def main() -> int:
    if len(sys.argv) == 2:
        return subprocess.run([sys.executable, __file__, sys.argv[1], str(time.time())], check=False).returncode
    work(sys.argv[1], float(sys.argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
